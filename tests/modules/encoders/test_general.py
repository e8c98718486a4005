import pytest
import torch

from ldm.errors import ConfigError
from ldm.modules.encoders.modules import AbstractEncoder, ClassEmbedder, IdentityEncoder, SpatialRescaler


def test_identity_gives_back_what_it_gets():
    condition = object()
    assert IdentityEncoder().encode(condition) is condition
    assert IdentityEncoder()(condition) is condition


def test_an_encoder_without_encode_says_so():
    with pytest.raises(NotImplementedError, match="AbstractEncoder"):
        AbstractEncoder().encode("a")


def test_a_class_is_its_row_of_the_table():
    embedder = ClassEmbedder(4, n_classes=10, key="class_label")
    got = embedder.encode({"class_label": torch.tensor([3, 9])})
    assert got.equal(embedder.embedding.weight[[3, 9]][:, None])
    assert embedder({"other": torch.tensor([1])}, key="other").shape == (1, 1, 4)


def test_the_last_class_is_no_class():
    embedder = ClassEmbedder(4, n_classes=10)
    assert embedder.get_unconditional_conditioning(3)["class"].tolist() == [9, 9, 9]


def test_labels_are_dropped_in_training_alone_and_only_if_asked():
    embedder = ClassEmbedder(4, n_classes=10, ucg_rate=1.0)
    batch = {"class": torch.tensor([1, 2])}
    last = embedder.embedding.weight[[9, 9]][:, None]
    assert embedder(batch).equal(last)
    assert embedder(batch, disable_dropout=True).equal(embedder.eval()(batch))
    assert not embedder(batch).equal(last)
    assert batch["class"].tolist() == [1, 2]
    plain = ClassEmbedder(4, n_classes=10)
    assert plain(batch).equal(plain.embedding.weight[[1, 2]][:, None])


def test_a_rescaler_halves_a_picture_at_each_stage():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert SpatialRescaler(n_stages=1).encode(x).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    assert SpatialRescaler(n_stages=2)(x).tolist() == [[[[7.5]]]]
    assert SpatialRescaler(n_stages=0)(x) is x
    assert SpatialRescaler(method="nearest", multiplier=2)(x).shape == (1, 1, 8, 8)


def test_a_rescaler_may_map_channels():
    rescaler = SpatialRescaler(in_channels=3, out_channels=2, bias=True)
    assert {key: tuple(w.shape) for key, w in rescaler.state_dict().items()} == {
        "channel_mapper.weight": (2, 3, 1, 1), "channel_mapper.bias": (2,),
    }
    x = torch.rand(1, 3, 4, 4)
    assert rescaler(x).shape == (1, 2, 2, 2)
    assert rescaler.to(torch.bfloat16)(x).dtype == torch.bfloat16
    assert not SpatialRescaler().state_dict()


@pytest.mark.parametrize("wrong", [{"method": "magic"}, {"n_stages": -1}])
def test_a_rescaler_refuses_what_it_cannot_do(wrong):
    with pytest.raises(ConfigError, match="SpatialRescaler"):
        SpatialRescaler(**wrong)
