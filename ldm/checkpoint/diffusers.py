"""Folders in the layout of the diffusers library, a subfolder for each part of a model, as one checkpoint of ours.

The tables give our name and theirs for each weight, from which both reading and writing follow. A weight that is one
with us and several with them has a name for each piece, NAME/0, NAME/1 ...
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import kunet
from ldm.checkpoint.archive import MappedFile, read_archive
from ldm.checkpoint.dpt import classifier, dpt_names
from ldm.checkpoint.names import rename
from ldm.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

Names = list[tuple[str, str]]  # (our prefix, theirs): the first that fits wins, in either direction

INDEX = "model_index.json"
REST = "ldm_rest.safetensors"  # beside the index: what has no place in their layout, under our names

# Which subfolder holds which part of our state dict; the first row whose subfolders are all there is the layout.
NETWORKS = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
LAYOUTS = (
    {**NETWORKS, "text_encoder": "cond_stage_model.", "depth_estimator": "depth_model.model."},
    {**NETWORKS, "text_encoder": "cond_stage_model.", "image_encoder": "embedder.",
     "image_normalizer": "noise_augmentor."},
    {**NETWORKS, "text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."},
    {**NETWORKS, "text_encoder_2": "conditioner.embedders.0."},
    {**NETWORKS, "image_encoder": "cond_stage_model."},
    {**NETWORKS, "text_encoder": "cond_stage_model."},
)
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
           "text_encoder_2": "CLIPTextModelWithProjection", "image_encoder": "CLIPVisionModelWithProjection",
           "image_normalizer": "StableUnCLIPImageNormalizer", "depth_estimator": "DPTForDepthEstimation"}

# The blocks of an OpenCLIP text tower by its width; their folders leave out the last, which Stable Diffusion 2 skips.
OPEN_CLIP_BLOCKS = {1024: 24, 1280: 32}

STEM = r"(diffusion_pytorch_model|model|pytorch_model)"
WEIGHTS = [re.compile(STEM + ending) for ending in (
    r"\.safetensors", r"\.safetensors\.index\.json", r"\.bin", r"\.bin\.index\.json",
    r"\.\w+\.safetensors", r"(\.\w+)?\.safetensors\.index(\.\w+)?\.json",  # a variant, such as fp16
    r"\.\w+\.bin", r"(\.\w+)?\.bin\.index(\.\w+)?\.json",
)]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the two names

RESNET = [("in_layers.0.", "norm1."), ("in_layers.2.", "conv1."), ("emb_layers.1.", "time_emb_proj."),
          ("out_layers.0.", "norm2."), ("out_layers.3.", "conv2."), ("skip_connection.", "conv_shortcut.")]
UNET = [("time_embed.0.", "time_embedding.linear_1."), ("time_embed.2.", "time_embedding.linear_2."),
        ("label_emb.0.0.", "add_embedding.linear_1."), ("label_emb.0.2.", "add_embedding.linear_2."),
        ("label_emb.0.0.", "class_embedding.linear_1."), ("label_emb.0.2.", "class_embedding.linear_2."),
        ("label_emb.weight", "class_embedding.weight"), ("input_blocks.0.0.", "conv_in."),
        ("middle_block.1.", "mid_block.attentions.0."), ("out.0.", "conv_norm_out."), ("out.2.", "conv_out.")]

STAGE = [(name, name) for name in ("quant_conv.", "post_quant_conv.", "encoder.conv_in.", "encoder.conv_out.",
                                   "decoder.conv_in.", "decoder.conv_out.")]
STAGE_RESNET = [("nin_shortcut.", "conv_shortcut."), ("", "")]
# The second spelling of each is that of folders from before 2023.
STAGE_ATTENTION = [("norm.", "group_norm."), ("q.", "to_q."), ("k.", "to_k."), ("v.", "to_v."),
                   ("proj_out.", "to_out.0."), ("q.", "query."), ("k.", "key."), ("v.", "value."),
                   ("proj_out.", "proj_attn.")]

CLIP = [("transformer.text_model.", "text_model."), ("transformer.text_projection.", "text_projection.")]
OPEN_CLIP = [("model.token_embedding.", "text_model.embeddings.token_embedding."),
             ("model.positional_embedding", "text_model.embeddings.position_embedding.weight"),
             ("model.ln_final.", "text_model.final_layer_norm."), ("model.text_projection", "text_projection.weight")]
OPEN_CLIP_BLOCK = [("ln_1.", "layer_norm1."), ("ln_2.", "layer_norm2."), ("mlp.c_fc.", "mlp.fc1."),
                   ("mlp.c_proj.", "mlp.fc2."), ("attn.out_proj.", "self_attn.out_proj.")]
OPEN_CLIP_BLOCK += [(f"attn.in_proj_{kind}/{index}", f"self_attn.{letter}_proj.{kind}")
                    for kind in ("weight", "bias") for index, letter in enumerate("qkv")]

PICTURE = [("class_embedding", "embeddings.class_embedding"), ("conv1.", "embeddings.patch_embedding."),
           ("positional_embedding", "embeddings.position_embedding.weight"), ("ln_pre.", "pre_layrnorm."),
           ("ln_post.", "post_layernorm.")]

# The width of the text tower that belongs to a picture tower, by the width of that.
TEXT_WIDTHS = {1024: 768, 1280: 1024}

# Newer versions of transformers leave this level out.
TEXT_LEVEL = [(part, f"text_model.{part}") for part in ("embeddings.", "encoder.", "final_layer_norm.")]


def unet_names(keys: Collection[str]) -> Names:
    """The names of a UNet's weights, whose shape the keys tell, ours or theirs.

    They count blocks within a level, we count through; their up-samplers stand apart, ours are the last of three.
    """
    if kunet.OURS in keys or kunet.THEIRS in keys:
        return kunet.K_UNET
    if found(keys, r"down_blocks\.(\d+)\."):
        levels = 1 + max(found(keys, r"down_blocks\.(\d+)\."))
        blocks = len(found(keys, r"down_blocks\.0\.resnets\.(\d+)\."))
        attended = found(keys, r"up_blocks\.(\d+)\.attentions\.")
    else:
        halvings = found(keys, r"input_blocks\.(\d+)\.0\.op\.")
        levels = 1 + len(halvings)
        blocks = max(0, min(halvings, default=len(found(keys, r"input_blocks\.(\d+)\."))) - 1)
        attended = {place // (blocks + 1) for place in found(keys, r"output_blocks\.(\d+)\.1\.norm\.")}
    names = [*UNET, *under(RESNET, "middle_block.0.", "mid_block.resnets.0."),
             *under(RESNET, "middle_block.2.", "mid_block.resnets.1.")]
    for level in range(levels):
        down, up = f"down_blocks.{level}.", f"up_blocks.{level}."
        first = level * (blocks + 1)
        for block in range(blocks):
            names += unet_block(f"input_blocks.{first + block + 1}.", down, block)
        names.append((f"input_blocks.{first + blocks + 1}.0.op.", f"{down}downsamplers.0.conv."))
        last = 2 if level in attended else 1
        names.append((f"output_blocks.{first + blocks}.{last}.conv.", f"{up}upsamplers.0.conv."))
        for block in range(blocks + 1):
            names += unet_block(f"output_blocks.{first + block}.", up, block)
    return names


def unet_block(ours: str, theirs: str, block: int) -> Names:
    """A residual block and the transformer after it."""
    return [*under(RESNET, f"{ours}0.", f"{theirs}resnets.{block}."), (f"{ours}1.", f"{theirs}attentions.{block}.")]


def vae_names(keys: Collection[str]) -> Names:
    """The names of a KL autoencoder's weights: our decoder's levels count from the picture, theirs from the latent."""
    levels = 1 + max(found(keys, r"decoder\.up(?:_blocks)?\.(\d+)\."), default=-1)
    names = [*STAGE]
    for side, ours, theirs, sampler in (("encoder", "down", "down_blocks", "downsample"),
                                        ("decoder", "up", "up_blocks", "upsample")):
        blocks = len(found(keys, rf"{side}\.(?:down|up)(?:_blocks)?\.0\.(?:block|resnets)\.(\d+)\."))
        for level in range(levels):
            our = f"{side}.{ours}.{level}."
            their = f"{side}.{theirs}.{level if side == 'encoder' else levels - 1 - level}."
            for block in range(blocks):
                names += under(STAGE_RESNET, f"{our}block.{block}.", f"{their}resnets.{block}.")
            names.append((f"{our}{sampler}.", f"{their}{sampler}rs.0."))
        names += under(STAGE_ATTENTION, f"{side}.mid.attn_1.", f"{side}.mid_block.attentions.0.")
        for block in range(2):
            names += under(STAGE_RESNET, f"{side}.mid.block_{block + 1}.", f"{side}.mid_block.resnets.{block}.")
        names.append((f"{side}.norm_out.", f"{side}.conv_norm_out."))
    return names


def open_clip_names(keys: Collection[str], skip: int = 0) -> Names:
    """The names of the weights of OpenCLIP's text tower, but for the last `skip` blocks."""
    blocks = found(keys, r"(?:model\.transformer\.resblocks|text_model\.encoder\.layers)\.(\d+)\.")
    names = [*OPEN_CLIP]
    for block in sorted(blocks)[:len(blocks) - skip]:
        ours, theirs = f"model.transformer.resblocks.{block}.", f"text_model.encoder.layers.{block}."
        names += under(OPEN_CLIP_BLOCK, ours, theirs)
    return names


def picture_names(keys: Collection[str]) -> Names:
    """The names of the weights of CLIP's picture tower."""
    blocks = found(keys, r"(?:model\.visual\.transformer\.resblocks|vision_model\.encoder\.layers)\.(\d+)\.")
    names = [*under(PICTURE, "model.visual.", "vision_model."), ("model.visual.proj", "visual_projection.weight")]
    for block in sorted(blocks):
        names += under(OPEN_CLIP_BLOCK, f"model.visual.transformer.resblocks.{block}.",
                       f"vision_model.encoder.layers.{block}.")
    return names


NAMES: dict[str, Callable[[Collection[str]], Names]] = {
    "unet": unet_names, "vae": vae_names, "image_encoder": picture_names, "depth_estimator": dpt_names,
    "image_normalizer": lambda keys: [("data_mean", "mean"), ("data_std", "std")],
}


def found(keys: Collection[str], pattern: str) -> set[int]:
    """The numbers that stand in the keys where the pattern has its group; no model has blocks of three digits."""
    return {int(match[1]) for match in map(re.compile(pattern, re.ASCII).match, keys) if match and len(match[1]) < 3}


def place(name: str, names: Names) -> str | None:
    """Their name for one of ours; None where it has no place with them."""
    return next((theirs + name.removeprefix(ours) for ours, theirs in names if name.startswith(ours)), None)


def under(names: Names, ours: str, theirs: str) -> Names:
    return [(ours + our, theirs + their) for our, their in names]


# ------------------------------------------------------------------------------------------------- shapes that differ

POINTWISE = re.compile(r"first_stage_model\.\w+\.mid\.attn_1\.(q|k|v|proj_out)\.weight")  # 1x1 convolutions with us
FUSED = re.compile(r".*\.attn\.(?:in_proj_|qkv\.)(?:weight|bias)")
PIECE = re.compile(FUSED.pattern + "/[0-2]")
TURNED = re.compile(r".*\.model\.(text_projection|visual\.proj)")


def join(name: str, pieces: Sequence[Tensor]) -> Tensor:
    """Our weight from theirs, or from its pieces."""
    weight = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
    if POINTWISE.fullmatch(name):
        return weight.reshape(*weight.shape[:2], 1, 1)
    return weight.T if TURNED.fullmatch(name) else weight


def split(name: str, weight: Tensor) -> list[Tensor]:
    """Their weight from ours, or its pieces: what `join` puts together again."""
    if FUSED.fullmatch(name):
        return list(weight.chunk(3))
    if POINTWISE.fullmatch(name):
        return [weight.reshape(weight.shape[:2])]
    return [weight.T if TURNED.fullmatch(name) else weight]


class MappedFolder:
    """The mapped files of one folder, as one."""

    def __init__(self, path: Path):
        self.path = path
        self.files: list[MappedFile] = []

    def open(self, path: Path) -> dict[str, Tensor]:
        """The weights of one more file."""
        try:
            file = MappedFile(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: {error}; download it again") from error
        self.files.append(file)
        tree = read_archive(file)
        if not isinstance(tree, dict) or not all(isinstance(weight, Tensor) for weight in tree.values()):
            raise CheckpointError(f"{path} is not a plain state dict, which the files of such a folder are")
        return tree

    def release(self, tensor: Tensor) -> None:
        """As MappedFile.release; a tensor of no file, put together from several, is left alone."""
        start = tensor.untyped_storage().data_ptr()
        for file in self.files:
            if file.address <= start < file.address + file.size:
                file.release(tensor)


class Joined(Mapping[str, Tensor]):
    """Weights under our names, put together from their pieces when they are asked for: making one reads no numbers."""

    def __init__(self, pieces: Mapping[str, Sequence[Tensor]], folder: MappedFolder):
        self.pieces, self.folder = pieces, folder

    def __getitem__(self, name: str) -> Tensor:
        pieces = self.pieces[name]
        weight = join(name, pieces)
        if len(pieces) > 1:
            for piece in pieces:
                self.folder.release(piece)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def outline(self) -> dict[str, Tensor]:
        return {name: join(name, [piece.to("meta") for piece in pieces]) for name, pieces in self.pieces.items()}


# ------------------------------------------------------------------------------------------------------------ reading

def read_folder(path: Path) -> Joined:
    """The weights of a model folder under our names, mapped: sharded, a variant, safetensors or .bin.

    What Stable Diffusion 2 does not use and such folders lack, the last block of its text encoder among it, is zero: a
    block of zeros hands on what it is given. Raises CheckpointError where a part is missing, damaged or another.
    """
    folder, pieces = MappedFolder(path), {}
    for part, prefix in layout(path).items():
        state = rename(read_part(folder, path / part), TEXT_LEVEL if part.startswith("text") else [])
        names = part_names(part, state)
        for name, weight in rename(state, [(theirs, ours) for ours, theirs in names]).items():
            whole, index = (name[:-2], int(name[-1])) if PIECE.fullmatch(name) else (name, 0)
            pieces.setdefault(prefix + whole, {})[index] = weight
        if part.startswith("text") and names is not CLIP:
            add_unused(pieces, f"{prefix}model.")
        if part == "image_encoder":
            add_text_leftovers(pieces, f"{prefix}model.")
        if part == "depth_estimator":
            width = pieces[f"{prefix}pretrained.model.cls_token"][0].shape[-1]
            for name, shape in classifier(width).items():
                pieces[prefix + name] = {0: torch.zeros(()).expand(shape)}
    whole = {name: [own[index] for index in sorted(own)] for name, own in pieces.items()}
    if (path / REST).is_file():
        whole |= {name: split(name, weight) for name, weight in folder.open(path / REST).items()}
    return Joined(whole, folder)


def layout(path: Path) -> dict[str, str]:
    """The subfolders that hold the parts, with our prefix of each."""
    index = read_json(path / INDEX)
    for row in LAYOUTS:
        if all((path / part).is_dir() for part in row):
            break
    else:
        missing = ", ".join(part for part in LAYOUTS[-1] if not (path / part).is_dir())
        raise CheckpointError(f"{path} ({index.get('_class_name')}) has no {missing}: it is no Stable Diffusion model, "
                              "or its download is not complete")
    for part in row:
        kind = (index.get(part) or [None, None])[-1]
        if kind not in (None, CLASSES[part], "CLIPTextModelWithProjection"):
            raise CheckpointError(f"{path / part} is a {kind}; what can be read is a {CLASSES[part]}")
    return row


def part_names(part: str, state: Mapping[str, Tensor]) -> Names:
    """The names of one part, told by the weights under their names."""
    if part in NAMES:
        return NAMES[part](state)
    if part == "text_encoder_2":
        return open_clip_names(state)
    embedding = state.get("text_model.embeddings.token_embedding.weight")
    return open_clip_names(state) if embedding is not None and embedding.shape[-1] in OPEN_CLIP_BLOCKS else CLIP


def read_part(folder: MappedFolder, path: Path) -> dict[str, Tensor]:
    """The weights in one subfolder: whole rather than a variant, safetensors rather than .bin."""
    present = sorted((entry.name for entry in path.iterdir()), key=lambda name: ("non_ema" in name, name))
    name = next((name for pattern in WEIGHTS for name in present if pattern.fullmatch(name)), None)
    if name is None:
        raise CheckpointError(f"{path} holds no weights (diffusion_pytorch_model.safetensors, model.safetensors ...): "
                              "its download is not complete")
    if len(name.split(".")) > 2:
        logger.info("%s: reading %s", path, name)
    if not name.endswith(".json"):
        return folder.open(path / name)
    shards = read_json(path / name).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{path / name} does not say which weights are in which file: download it again")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{path / name} names a file outside of its folder, {shard!r}: it was not read")
        state |= folder.open(path / shard)
    if missing := [key for key in shards if key not in state]:
        raise CheckpointError(f"{path / name} promises {len(missing)} weights that are in none of its files, "
                              f"{missing[0]!r} the first: download it again")
    return state


def add_unused(pieces: dict[str, dict[int, Tensor]], prefix: str) -> None:
    """Zeros, which take no memory, for what OpenCLIP has and no folder of Stable Diffusion 2, or XL, does."""
    words = pieces[f"{prefix}token_embedding.weight"][0]
    width = words.shape[-1]
    shapes = {f"{prefix}text_projection": (width, width), f"{prefix}logit_scale": ()}
    first = f"{prefix}transformer.resblocks.0."
    last = f"{prefix}transformer.resblocks.{OPEN_CLIP_BLOCKS.get(width, 1) - 1}."
    for name, own in list(pieces.items()):
        if name.startswith(first):
            shapes[last + name.removeprefix(first)] = torch.cat([piece.to("meta") for piece in own.values()]).shape
    for name, shape in shapes.items():
        pieces.setdefault(name, {0: torch.zeros((), dtype=words.dtype).expand(shape)})


def add_text_leftovers(pieces: dict[str, dict[int, Tensor]], prefix: str) -> None:
    """Zeros, which take no memory, for what is left of the text tower in picture encoders that are known by name."""
    projection = pieces[f"{prefix}visual.proj"][0]
    embed, width = projection.shape
    if text := TEXT_WIDTHS.get(width):
        shapes = {"token_embedding.weight": (49408, text), "positional_embedding": (77, text),
                  "ln_final.weight": (text,), "ln_final.bias": (text,), "text_projection": (text, embed),
                  "logit_scale": ()}
        for name, shape in shapes.items():
            pieces[prefix + name] = {0: torch.zeros((), dtype=projection.dtype).expand(shape)}


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object. Raises ConfigError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content
