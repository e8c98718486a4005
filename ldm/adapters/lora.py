"""Low-rank changes of a model's layers (LoRA, Hu et al. 2021), read from a file and added to the weights.

A file says for some layers W' = W + weight * alpha / rank * up @ down. The sum is made in float32 and cast once.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm.adapters.names import Place, flat, places
from ldm.checkpoint import UNKNOWN, Checkpoint, identify, open_checkpoint
from ldm.errors import CheckpointError

# A key is a layer's name and what it says of that layer; peft puts the adapter's own name between, "default" mostly.
KEY = re.compile(
    r"(?P<layer>.+)[._](?:"
    r"(?P<down>(?:lora_down|lora_A(?:\.\w{1,64})?|lora(?:_linear_layer)?\.down)\.weight)"
    r"|(?P<up>(?:lora_up|lora_B(?:\.\w{1,64})?|lora(?:_linear_layer)?\.up)\.weight)"
    r"|(?P<mid>lora_mid\.weight)"
    r"|(?P<alpha>alpha))"
)

# Other kinds of adapters, by the end of one of their keys.
OTHER_KINDS = (
    (r"hada_[wt]\d\w*", "LoHa"), (r"lokr_[wt]\d\w*", "LoKr"), (r"dora_scale|lora_magnitude_vector(\.weight)?", "DoRA"),
    (r"oft_(blocks|R\.weight|diag)", "OFT"), (r"on_input", "IA3"), (r"vera_lambda_\w", "VeRA"),
    (r"diff(_b)?|[wb]_norm", "full-weight"),
)  # fmt: skip

# The family that an adapter is for, by a part of the flat name of one of its layers; the first that is found counts.
FAMILY_BY_NAME = (
    (r"double_blocks|single_blocks|single_transformer_blocks", "FLUX"),
    (r"joint_blocks|^transformer_transformer_blocks|^lora_te3_|^text_encoder_3_", "Stable Diffusion 3"),
    (r"^lora_te[12]_|^text_encoder_2_|transformer_blocks_[1-9]", "Stable Diffusion XL"),
)
# Else by the width of what its cross-attention or its text encoder reads.
READS_CONTEXT = re.compile(r"attn2_to_[kv]$")
READS_TEXT = re.compile(r"encoder_layers_\d+_(self_attn_[qkv]_proj|self_attn_to_[qkv]|mlp_fc1)$")
FAMILY_BY_WIDTH = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}

LISTED = 8  # names that an error quotes


@dataclass(frozen=True)
class Layer:
    """The change of one layer, scale * up @ down, by the name that its file has for it.

    up (out, rank) and down (rank, in), each with the kernel of a convolution after that; or up, mid (rank, rank, k, k)
    and down, three convolutions in a row.
    """

    name: str
    up: Tensor
    down: Tensor
    mid: Tensor | None
    scale: float

    @property
    def flat(self) -> str:
        return flat(self.name.replace(".processor.", "."))

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight which it changes."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return bare((self.up.shape[0], self.down.shape[1], *kernel))

    def change(self, like: Tensor, weight: float = 1.0) -> Tensor:
        """What is added at a weight of 1 or another: of the shape, dtype and device of `like`."""
        up, down = (factor.to(like).flatten(1) for factor in (self.up, self.down))
        up = weight * self.scale * up
        full = up @ down if self.mid is None else torch.einsum("or,rskl,si->oikl", up, self.mid.to(up), down)
        return full.reshape(like.shape)


@dataclass(frozen=True)
class Lora:
    """The changes that a file holds, and the weight that they are added with."""

    path: Path
    layers: tuple[Layer, ...]
    weight: float = 1.0


class Merged:
    """Adapters in the weights of a model: `undo` puts back what was there, bit for bit; of several, the last first."""

    def __init__(self, originals: list[tuple[Place, Tensor]]):
        self._originals = originals

    def undo(self) -> None:
        for place, original in self._originals:
            place.rows.copy_(original)
        self._originals = []


def merge(model: nn.Module, loras: Sequence[Lora]) -> Merged:
    """Add adapters to the weights of a diffusion model, so that it can be undone.

    The weights that are touched wait in main memory as they were: a sum that is taken back does not give the same bits.
    Raises CheckpointError, with the model untouched, where an adapter is for another one.
    """
    originals = []
    for place, changed in changes(model, loras):
        originals.append((place, place.rows.to("cpu", copy=True)))
        place.rows.copy_(changed)
    return Merged(originals)


def merge_for_good(model: nn.Module, loras: Sequence[Lora]) -> None:
    """As `merge`, without the memory that undoing takes."""
    for place, changed in changes(model, loras):
        place.rows.copy_(changed)


def changes(model: nn.Module, loras: Sequence[Lora]) -> Iterator[tuple[Place, Tensor]]:
    """(place, its weight and all that is added to it, in float32), one place at a time."""
    known = places(model)
    plan: dict[tuple[int, int], tuple[Place, list[tuple[Layer, float]]]] = {}
    for lora in loras:
        check_fit(lora, known, model)
        for layer in lora.layers:
            place = known[layer.flat]
            plan.setdefault(place.key, (place, []))[1].append((layer, lora.weight))
    for place, added in plan.values():
        total = place.rows.to(torch.float32, copy=True)
        for layer, weight in added:
            total += layer.change(total, weight)
        yield place, total


def check_fit(lora: Lora, known: Mapping[str, Place], model: nn.Module) -> None:
    """Raise CheckpointError where layers of an adapter have no place in the model, with the family that it is for."""
    unknown = [layer.name for layer in lora.layers if layer.flat not in known]
    shapes = [(layer, bare(known[layer.flat].rows.shape)) for layer in lora.layers if layer.flat in known]
    misshapen = [f"{layer.name} {layer.shape} instead of {shape}" for layer, shape in shapes if layer.shape != shape]
    if not unknown and not misshapen:
        return
    own = identify({name: tuple(weight.shape) for name, weight in model.state_dict(keep_vars=True).items()})
    meant = family_of(lora)
    verdict = ""
    if meant and not own.name.startswith(meant):
        verdict = f": it is for {meant}" + ("" if own is UNKNOWN else f", and this is {own.name}")
    lists = {"are not in it": unknown, "are of another shape": misshapen}
    details = "; ".join(
        f"{len(names)} of {len(lora.layers)} layers {are}: {some(names)}" for are, names in lists.items() if names
    )
    raise CheckpointError(f"{lora.path} does not fit the model{verdict} ({details})")


def family_of(lora: Lora) -> str | None:
    """The family that an adapter seems to be made for, where its names and widths tell."""
    for pattern, family in FAMILY_BY_NAME:
        if any(re.search(pattern, layer.flat) for layer in lora.layers):
            return family
    for reads in (READS_CONTEXT, READS_TEXT):
        if layer := next((layer for layer in lora.layers if reads.search(layer.flat)), None):
            return FAMILY_BY_WIDTH.get(layer.shape[1])
    return None


def read_lora(path: str | Path, weight: float = 1.0) -> Lora:
    """Read the LoRA file (.safetensors, .ckpt, .pt, .bin) of Kohya's trainer, diffusers or peft, convolutions included.

    weight: what the changes are multiplied by; a negative one turns them round. Raises CheckpointError with what is
    wrong with the file, also where it is an adapter of another kind.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no LoRA file {path}")
    file = open_checkpoint(path)
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    left = []
    for key, tensor in file.tensors.items():
        match = KEY.fullmatch(key)
        if match and match.lastgroup not in parts[match["layer"]]:
            parts[match["layer"]][match.lastgroup] = tensor
        else:
            left.append(key)
    check_whole(file, left, bool(parts))
    scales = Scales(file.path)
    return Lora(file.path, tuple(read_layer(name, found, scales) for name, found in parts.items()), weight)


def check_whole(file: Checkpoint, left: Sequence[str], has_layers: bool) -> None:
    """Raise CheckpointError where keys are `left` over, or where a file says nothing of any layer."""
    ends = [kind for key in left for end, kind in OTHER_KINDS if re.search(rf"\.({end})$", key)]
    if kind := next(iter(ends), None):
        raise CheckpointError(f"{file.path} is a {kind} adapter, which is not supported: LoRA and LoCon are")
    if not has_layers:
        what = some(left) if file.family is UNKNOWN else f"the weights of {file.family.name}"
        raise CheckpointError(f"{file.path} holds no LoRA, but {what}")
    if left:
        raise CheckpointError(f"{file.path} has {len(left)} weights that are no part of a LoRA: {some(left)}")


def read_layer(name: str, found: Mapping[str, Tensor], scales: "Scales") -> Layer:
    """The change of one layer from the parts that a file has of it. Raises CheckpointError where they make none."""
    up, down, mid, alpha = (found.get(part) for part in ("up", "down", "mid", "alpha"))
    sizes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in found.items())
    if up is None or down is None:
        raise scales.error(f"is not complete: of {name} it has only {sizes}")
    whole = down.ndim >= 2 and down.shape[0] > 0 and len(bare(up.shape)) == 2 and (alpha is None or alpha.numel() == 1)
    if mid is None:
        whole = whole and up.shape[1] == down.shape[0]
    else:
        whole = whole and len(bare(down.shape)) == 2 and mid.ndim == 4 and mid.shape[:2] == (up.shape[1], down.shape[0])
    if not whole:
        raise scales.error(f"is damaged: {name} is made of {sizes}")
    if not all(torch.isfinite(tensor.float()).all() for tensor in found.values()):
        raise scales.error(f"is damaged: {name} has numbers that are not finite")
    rank = down.shape[0]
    return Layer(name, up, down, mid, scales.of(name, rank) if alpha is None else alpha.item() / rank)


class Scales:
    """What a file's settings say of the scale of its layers, where these carry no alpha of their own.

    diffusers keeps the settings of peft in the header of a file, each after the name of its network; peft in
    adapter_config.json beside it. Without either, alpha is the rank.
    """

    def __init__(self, path: Path):
        self.path = path
        beside = path.with_name("adapter_config.json")
        try:
            if path.stem == "adapter_model" and beside.is_file():
                self.settings = dict(json.loads(beside.read_text(encoding="utf-8")))
            else:
                self.settings = dict(json.loads(header(path).get("lora_adapter_metadata", "{}")))
        except (ValueError, TypeError, RecursionError) as error:
            raise self.error(f"has settings that cannot be read: {error}") from error

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}")

    def of(self, name: str, rank: int) -> float:
        """The scale of a layer, alpha / rank, or alpha / sqrt(rank) where the settings say so (rsLoRA)."""
        network = name.partition(".")[0] + "."
        own = {key.removeprefix(network): value for key, value in self.settings.items() if key.startswith(network)}
        settings: dict[str, Any] = own or self.settings
        try:
            others = settings.get("alpha_pattern") or {}
            if expression := next((end for end in others if re.search(r"[^\w.]", end)), None):
                raise self.error(f"scales its layers by the expression {expression!r}, which is not supported")
            plain = settings.get("lora_alpha", rank)
            alpha = next((alpha for end, alpha in others.items() if f".{name}".endswith(f".{end}")), plain)
            return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
        except (TypeError, ValueError, AttributeError) as error:
            raise self.error(f"has settings that make no sense: {error}") from error


def header(path: Path) -> Mapping[str, str]:
    """The texts that a safetensors file carries beside its weights; none of a file of another format."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def bare(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a weight without a kernel of 1x1: such a convolution is a linear layer."""
    return tuple(shape[:2]) if all(side == 1 for side in shape[2:]) else tuple(shape)


def some(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
