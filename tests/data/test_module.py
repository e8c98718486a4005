"""The data module: its loaders, and beginning in the middle of an epoch."""

import pytest
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import IterableDataset, default_collate

from ldm.data.module import DataModuleFromConfig, ResumableLoader, ResumableSampler

SHAPES = {"target": "ldm.data.shapes.ShapesDataset", "params": {"n": 10, "size": 16}}


def module(**options) -> DataModuleFromConfig:
    made = DataModuleFromConfig(batch_size=4, num_workers=0, **{"train": SHAPES, "validation": SHAPES, **options})
    made.setup()
    return made


def captions(loader) -> list[list[str]]:
    return [batch["caption"] for batch in loader]


def test_each_split_that_the_config_names_has_a_loader_and_no_other():
    made = module()
    assert [len(batch) for batch in captions(made.train_dataloader())] == [4, 4, 2]
    assert made.val_dataloader() is not None
    with pytest.raises(MisconfigurationException, match="test_dataloader"):
        made.test_dataloader()


def test_training_is_shuffled_by_the_seed_and_validation_is_not():
    made, again, other = module(seed=1), module(seed=1), module(seed=2)
    straight = captions(made.val_dataloader())
    assert captions(made.train_dataloader()) == captions(again.train_dataloader()) != straight
    assert captions(made.train_dataloader()) != captions(other.train_dataloader())


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_loader_that_is_set_to_a_place_goes_on_from_there_and_then_from_the_start(epoch):
    made = module()
    loader = made.train_dataloader()
    loader.sampler.set_epoch(epoch)
    whole = captions(loader)

    later = made.train_dataloader()
    later.seek(epoch, 2)
    assert captions(later) == whole[2:]
    assert captions(later) == whole


def test_each_epoch_has_another_order():
    loader = module().train_dataloader()
    first = captions(loader)
    loader.sampler.set_epoch(1)
    assert captions(loader) != first


def test_ranks_share_the_examples_of_an_epoch():
    samplers = [ResumableSampler(range(10), 2, rank, shuffle=True, seed=0) for rank in range(2)]
    assert sorted([*samplers[0], *samplers[1]]) == list(range(10))


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(range(10))


def test_a_stream_is_read_up_to_the_place_to_go_on_from():
    loader = ResumableLoader(Numbers(), batch_size=3, collate_fn=default_collate)
    loader.seek(epoch=0, batches=2)
    assert [batch.tolist() for batch in loader] == [[6, 7, 8], [9]]
    assert len(list(loader)) == 4


def test_anything_with_a_length_and_items_can_be_wrapped():
    made = DataModuleFromConfig(2, train={"target": "builtins.list", "params": {}}, wrap=True, num_workers=0)
    made.setup()
    assert len(made.datasets["train"]) == 0
