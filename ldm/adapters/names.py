"""What the layers of a model are called in adapter files.

Kohya's trainer writes a layer's name with underscores for dots, from which the name cannot be read back. So no name is
taken apart: every layer of the model is listed under all the names that it goes by, and names are compared `flat`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ldm.checkpoint.diffusers import CLIP, open_clip_names, place, unet_names
from ldm.modules.encoders.openclip import Attention
from ldm.modules.encoders.text import TextEncoder

# Before a layer's name: Kohya's trainer, diffusers, peft by itself, ComfyUI, and the first files of diffusers.
UNET_PREFIXES = ("lora_unet_", "unet_", "base_model_model_", "diffusion_model_", "")
# The same for the text encoders of a model, by how many it has.
TEXT_PREFIXES = {
    1: (("lora_te_", "text_encoder_", "base_model_model_", ""),),
    2: (("lora_te1_", "text_encoder_"), ("lora_te2_", "text_encoder_2_")),
}
# What the first files of diffusers have for the last parts of some names.
OLD_ENDS = {"to_out.0": "to_out", "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


class Place(NamedTuple):
    """A weight of the model, or one of the equal `parts` of its rows."""

    weight: nn.Parameter
    part: int = 0
    parts: int = 1

    @property
    def rows(self) -> Tensor:
        """A view of the numbers, to be read or written."""
        return self.weight.detach().chunk(self.parts)[self.part]

    @property
    def key(self) -> tuple[int, int]:
        return id(self.weight), self.part


def flat(name: str) -> str:
    return name.replace(".", "_")


def text_encoders(model: nn.Module) -> list[TextEncoder]:
    """The text encoders of a model, in the order in which files count them."""
    return [module for module in model.modules() if isinstance(module, TextEncoder)]


def places(model: nn.Module) -> dict[str, Place]:
    """{flat name: place} of every linear and convolution layer of a diffusion model, under all of its names."""
    found = {flat(name): Place(weight) for name, weight in matrices(model)}
    for name, where in unet_places(model.model.diffusion_model):
        found |= dict.fromkeys((prefix + flat(name) for prefix in UNET_PREFIXES), where)
    encoders = text_encoders(model)
    for encoder, prefixes in zip(encoders, TEXT_PREFIXES.get(len(encoders), ())):
        for name, where in text_places(encoder):
            found |= dict.fromkeys((prefix + flat(name) for prefix in prefixes), where)
    return found


def matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The name and the weight of each layer that an adapter can change."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            yield name, layer.weight


def unet_places(unet: nn.Module) -> Iterator[tuple[str, Place]]:
    """(name, place) of each layer of a UNet, by our name and by those of diffusers."""
    names = unet_names(unet.state_dict(keep_vars=True))
    for ours, weight in matrices(unet):
        theirs = place(f"{ours}.", names)
        for name in {ours, *spellings((theirs or ours).removesuffix("."))}:
            yield name, Place(weight)


def text_places(encoder: TextEncoder) -> Iterator[tuple[str, Place]]:
    """(name, place) of each layer of a text encoder of CLIP, by the names of transformers, old and new."""
    names = [*CLIP, *open_clip_names(encoder.state_dict(keep_vars=True))]
    found = [(f"{name}.weight", Place(weight)) for name, weight in matrices(encoder)]
    for name, layer in encoder.named_modules():
        if isinstance(layer, Attention):  # OpenCLIP's, whose three projections are one matrix
            found += [(f"{name}.in_proj_weight/{part}", Place(layer.in_proj_weight, part, 3)) for part in range(3)]
    for ours, where in found:
        if theirs := place(ours, names):
            for name in spellings(theirs.removesuffix(".weight")):
                yield name, where
                yield name.removeprefix("text_model."), where


def spellings(name: str) -> set[str]:
    """A name of diffusers, and what its first files have for it."""
    old = (name.removesuffix(new) + end for new, end in OLD_ENDS.items() if name.endswith(f".{new}"))
    return {name, *old}
