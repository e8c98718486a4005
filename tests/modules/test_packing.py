"""Weights in a second layout: the same answers whatever is done to them, and nothing where nothing is gained."""

import copy
import pickle

import pytest
import torch
from torch import nn

from ldm.modules import packing
from ldm.modules.packing import Packed, pack, packable, unpack

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_reorder_convolution_weight") or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="torch lays no weights out for this processor",
)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def layers() -> nn.ModuleDict:
    torch.manual_seed(0)
    made = {"linear": nn.Linear(512, 384), "bare": nn.Linear(512, 384, bias=False), "narrow": nn.Linear(8, 8),
            "conv": nn.Conv2d(128, 160, 3, padding=1), "strided": nn.Conv2d(128, 160, 3, stride=2, padding=1),
            "circular": nn.Conv2d(128, 160, 3, padding=1, padding_mode="circular")}  # fmt: skip
    return nn.ModuleDict(made).bfloat16()


def inputs(name: str, batch: int = 2, side: int = 8) -> torch.Tensor:
    shape = (batch, 128, side, side) if name in ("conv", "strided") else (batch, side, 512)
    return torch.randn(shape, generator=torch.Generator().manual_seed(batch * side)).bfloat16()


def assert_alike(made: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (made - wanted).float().norm() <= 0.01 * wanted.float().norm()


@pytest.mark.parametrize("name", ["linear", "bare", "conv", "strided"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_packed_layer_answers_as_before_at_any_size(name, layout):
    network = layers().to(memory_format=layout)
    sizes = [(2, 8), (1, 8), (3, 12)]
    wanted = [network[name](inputs(name, *size)) for size in sizes]
    pack(network)
    assert isinstance(network[name].forward, Packed)
    for size, answer in zip(sizes, wanted):
        assert_alike(network[name](inputs(name, *size)), answer)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_weights_that_change_or_are_replaced_are_laid_out_anew(name):
    network = layers()
    layer, x = network[name], inputs(name)
    pack(network)
    layer(x)
    with torch.inference_mode():
        layer.weight.mul_(-2)
    assert_alike(layer(x), type(layer).forward(layer, x))
    layer.weight = nn.Parameter(layer.weight * 3)
    assert_alike(layer(x), type(layer).forward(layer, x))


def test_names_and_weights_stay_and_unpacking_leaves_nothing():
    network = layers()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    pack(network)
    network["conv"](inputs("conv"))
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    unpack(network)
    assert not any("forward" in vars(layer) for layer in network.modules())


def test_a_copy_goes_its_own_way():
    network, x = layers(), inputs("conv")
    pack(network)
    before = network["conv"](x)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(other["conv"](x), before)
        other["conv"].weight.zero_()
        other["conv"].bias.zero_()
        assert not other["conv"](x).any()
        torch.testing.assert_close(network["conv"](x), before)


def test_small_layers_other_paddings_other_precisions_and_other_people_s_forwards_are_left_alone():
    network = layers()
    network["bare"].forward = theirs = lambda x: x
    pack(network)
    assert [name for name, layer in network.items() if "forward" not in vars(layer)] == ["narrow", "circular"]
    assert network["bare"].forward is theirs
    assert packable(layers().float()) == []


def test_gradients_flow_as_through_a_layer_that_is_not_packed():
    network = layers()
    pack(network)
    with torch.enable_grad():
        network["linear"](inputs("linear")).sum().backward()
    assert network["linear"].weight.grad is not None


def test_a_model_is_packed_where_there_is_a_matrix_unit_and_memory_and_unpacked_with_less(monkeypatch):
    from support import tiny_model

    from ldm import memory

    monkeypatch.setattr(packing, "LARGE", 1)
    monkeypatch.setattr(memory, "can_pack", lambda: True)
    usual = memory.set_attention("sdpa")
    try:
        cpu, model = torch.device("cpu"), tiny_model().bfloat16()
        network = model.model.diffusion_model

        def packed() -> int:
            return sum(isinstance(vars(layer).get("forward"), Packed) for layer in network.modules())

        memory.place(model, cpu)
        assert packed() == len(packable(network)) > 0
        memory.place(model, cpu, "lowest")
        assert packed() == 0
        monkeypatch.setattr(memory, "free_memory", lambda device: memory.WORKING_SPACE)
        memory.place(model, cpu)
        assert packed() == 0
    finally:
        memory.set_attention(usual)
