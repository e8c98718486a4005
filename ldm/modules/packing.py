"""Weights laid out once as a processor's matrix unit takes them in, instead of at every call of their layer."""

from typing import Any

import torch
from torch import Tensor, nn

# Weights of fewer bytes are laid out in no time.
LARGE = 1 << 18


class Packed:
    """The forward of a linear layer or a convolution in bfloat16 whose weight is kept in oneDNN's layout, too.

    It is laid out at the first call, and again where it has changed; what is written through `weight.data` is not seen.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        self.layer = layer
        self.made_of: tuple[int, ...] = ()
        self.weight: Tensor | None = None

    def __reduce__(self):
        return Packed, (self.layer,)  # a copy lays its own weight out

    def __call__(self, x: Tensor) -> Tensor:
        layer, weight = self.layer, self.layer.weight
        usual = torch.compiler.is_compiling() or torch.is_grad_enabled() or weight.is_inference()
        if usual or not x.dtype == weight.dtype == torch.bfloat16 or x.device.type != "cpu":
            return type(layer).forward(layer, x)
        window: tuple[Any, ...] = ()
        lay_out, compute = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        if isinstance(layer, nn.Conv2d):
            window = layer.padding, layer.stride, layer.dilation, layer.groups
            lay_out, compute = torch.ops.mkldnn._reorder_convolution_weight, torch.ops.mkldnn._convolution_pointwise
        made_of = id(weight), weight.data_ptr(), weight._version
        if made_of != self.made_of:
            size = x.shape if window else x.shape[:-1].numel()  # for which the layout is the best, while it fits all
            self.weight, self.made_of = lay_out(weight.detach(), *window, size), made_of
        return compute(x, self.weight, layer.bias, *window, "none", [], "")


def can_pack() -> bool:
    """Whether this processor has a matrix unit for bfloat16, and torch the operators that lay weights out for it."""
    names = ("_reorder_linear_weight", "_reorder_convolution_weight", "_linear_pointwise", "_convolution_pointwise")
    return bool(torch.cpu.get_capabilities().get("amx_bf16")) and all(hasattr(torch.ops.mkldnn, n) for n in names)


def packable(network: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """The layers of a network that gain by it; by exact type, for a subclass may do with its weight what it likes."""
    layers = [layer for layer in network.modules() if type(layer) in (nn.Linear, nn.Conv2d)]
    return [layer for layer in layers if layer.weight.dtype == torch.bfloat16 and layer.weight.nbytes >= LARGE
            and getattr(layer, "padding_mode", "zeros") == "zeros"]  # fmt: skip


def pack(network: nn.Module) -> None:
    """Let a network keep its large weights in a second layout, beside their own, from the first call on."""
    for layer in packable(network):
        if "forward" not in vars(layer):  # which somebody else may have put there
            layer.forward = Packed(layer)


def unpack(network: nn.Module) -> None:
    """Leave the weights of a network in one layout again."""
    for layer in network.modules():
        if isinstance(vars(layer).get("forward"), Packed):
            del layer.forward
