"""The data module of training configs, whose order of examples is a function of the seed, the epoch and the batch."""

import os
from collections.abc import Iterator, Mapping
from itertools import islice

import torch.distributed as dist
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info

from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.util import instantiate_from_config

SPLITS = ("train", "validation", "test", "predict")


class WrappedDataset(Dataset):
    """Anything with a length and items, as a dataset."""

    def __init__(self, dataset):
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        return self.data[index]


class ResumableSampler(DistributedSampler):
    """This rank's share of the indices, in an order drawn anew each epoch; `skip` leaves out those already seen."""

    skip = 0

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        return islice(super().__iter__(), skip, None)


class ResumableLoader(DataLoader):
    """A loader that can begin in the middle: `seek` decides where its next iteration starts, and only that one.

    Nothing is read, and no place forgotten, before the first batch is asked for.
    """

    skip = 0

    def seek(self, epoch: int, batches: int) -> None:
        """Begin the next iteration after so many batches of an epoch."""
        if not isinstance(self.dataset, IterableDataset):
            self.sampler.set_epoch(epoch)
        self.skip = batches

    def __iter__(self) -> Iterator:
        skip, self.skip = self.skip, 0
        if isinstance(self.dataset, IterableDataset):
            yield from islice(super().__iter__(), skip, None)
        else:
            self.sampler.skip = skip * self.batch_size
            yield from super().__iter__()


def split_records(worker_id: int) -> None:
    """Give each worker of a loader its own share of the records of a Txt2ImgIterableBaseDataset."""
    dataset, workers = get_worker_info().dataset, get_worker_info().num_workers
    if isinstance(dataset, Txt2ImgIterableBaseDataset) and dataset.valid_ids is not None:
        dataset.sample_ids = dataset.valid_ids[worker_id::workers]


class DataModuleFromConfig(LightningDataModule):
    """Loaders of the datasets that `train`, `validation`, `test` and `predict` describe by target and params.

    num_workers None is two for each entry of a batch, as far as there are processors. With `wrap` a dataset need only
    have a length and items.
    """

    def __init__(
        self,
        batch_size: int,
        train: Mapping | None = None,
        validation: Mapping | None = None,
        test: Mapping | None = None,
        predict: Mapping | None = None,
        wrap: bool = False,
        num_workers: int | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.batch_size = batch_size
        self.dataset_configs = {name: config for name, config in zip(SPLITS, (train, validation, test, predict))
                                if config is not None}
        self.wrap = wrap
        self.num_workers = min(2 * batch_size, os.cpu_count() or 1) if num_workers is None else num_workers
        self.use_worker_init_fn = use_worker_init_fn
        self.seed = seed
        self.shuffled = {"train": True, "validation": shuffle_val_dataloader, "test": shuffle_test_loader}
        self.datasets: dict[str, Dataset] = {}
        for split in self.dataset_configs:
            name = {"validation": "val"}.get(split, split)
            setattr(self, f"{name}_dataloader", getattr(self, f"_{name}_dataloader"))

    def prepare_data(self) -> None:
        """Build each dataset once, on one process, so that it can fetch or unpack what it needs."""
        for config in self.dataset_configs.values():
            instantiate_from_config(config)

    def setup(self, stage: str | None = None) -> None:
        if not self.datasets:
            self.datasets = {name: instantiate_from_config(config) for name, config in self.dataset_configs.items()}
            if self.wrap:
                self.datasets = {name: WrappedDataset(dataset) for name, dataset in self.datasets.items()}

    def loader(self, split: str) -> ResumableLoader:
        """The loader of a split from its first batch on."""
        dataset, sampler = self.datasets[split], None
        if not isinstance(dataset, IterableDataset):
            ranks = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
            sampler = ResumableSampler(dataset, *ranks, shuffle=self.shuffled.get(split, False), seed=self.seed)
        divides = isinstance(dataset, Txt2ImgIterableBaseDataset) or self.use_worker_init_fn
        return ResumableLoader(
            dataset, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers,
            worker_init_fn=split_records if divides else None, persistent_workers=self.num_workers > 0,
        )

    def _train_dataloader(self) -> ResumableLoader:
        """The training loader, set to the batch after the last one that the trainer has seen."""
        loader = self.loader("train")
        if self.trainer is None:
            return loader
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        if isinstance(loader.dataset, IterableDataset):
            loader.seek(self.trainer.current_epoch, progress.current.processed)
        else:
            limit = self.trainer.limit_train_batches
            epoch_length = min(limit, len(loader)) if isinstance(limit, int) else int(limit * len(loader))
            loader.seek(*divmod(progress.total.processed, max(epoch_length, 1)))
        return loader

    def _val_dataloader(self) -> ResumableLoader:
        return self.loader("validation")

    def _test_dataloader(self) -> ResumableLoader:
        return self.loader("test")

    def _predict_dataloader(self) -> ResumableLoader:
        return self.loader("predict")
