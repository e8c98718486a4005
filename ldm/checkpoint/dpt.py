"""The names of a depth network's weights: MiDaS' and timm's, which checkpoints have, and those of transformers."""

import re
from collections.abc import Collection

Names = list[tuple[str, str]]  # (our prefix, theirs), as in ldm.checkpoint.diffusers

OURS, THEIRS = "pretrained.model.", "dpt.embeddings."
ENCODER = [("cls_token", "cls_token"), ("pos_embed", "position_embeddings"), ("patch_embed.proj.", "projection."),
           ("patch_embed.backbone.stem.conv.", "backbone.bit.embedder.convolution."),
           ("patch_embed.backbone.stem.norm.", "backbone.bit.embedder.norm.")]  # fmt: skip
BLOCK = [("norm1.", "layernorm_before."), ("norm2.", "layernorm_after."), ("attn.proj.", "attention.output.dense."),
         ("mlp.fc1.", "intermediate.dense."), ("mlp.fc2.", "output.dense.")]  # fmt: skip
BLOCK += [(f"attn.qkv.{kind}/{index}", f"attention.attention.{name}.{kind}")
          for kind in ("weight", "bias") for index, name in enumerate(("query", "key", "value"))]
FUSION = [("out_conv.", "projection.")]
FUSION += [(f"resConfUnit{unit}.conv{conv}.", f"residual_layer{unit}.convolution{conv}.")
           for unit in (1, 2) for conv in (1, 2)]

# Two of the transformer's blocks become pictures again, the coarser one by one more convolution.
NECK = [(f"pretrained.act_postprocess{level + 1}.{ours}.", f"neck.reassemble_stage.{theirs}.")
        for level in (2, 3) for ours, theirs in (
            ("0.project.0", f"readout_projects.{level}.0"), ("3", f"layers.{level}.projection"),
            ("4", f"layers.{level}.resize"))]  # fmt: skip
NECK += [(f"scratch.layer{level + 1}_rn.", f"neck.convs.{level}.") for level in range(4)]
HEAD = [(f"scratch.output_conv.{layer}.", f"head.head.{layer}.") for layer in (0, 2, 4)]


def classifier(width: int) -> dict[str, tuple[int, ...]]:
    """What classifies pictures, by name and shape, which has no part in depth, and no place under their names."""
    return {f"{OURS}head.weight": (1000, width), f"{OURS}head.bias": (1000,)}


def dpt_names(keys: Collection[str]) -> Names:
    """The names of a DPT-hybrid's weights, whose depth the keys tell, ours or theirs.

    They count the decoder's levels from the coarsest. Theirs has no place for `head`, which classifies pictures.
    """
    names = [(f"{OURS}{our}", f"{THEIRS}{their}") for our, their in ENCODER]
    for stage, block in numbers(keys, r".*\.stages\.(\d)\.(?:blocks|layers)\.(\d\d?)\."):
        names.append((f"{OURS}patch_embed.backbone.stages.{stage}.blocks.{block}.",
                      f"{THEIRS}backbone.bit.encoder.stages.{stage}.layers.{block}."))
    for (block,) in numbers(keys, r"(?:pretrained\.model\.blocks|dpt\.encoder\.layer)\.(\d\d?)\."):
        names += [(f"{OURS}blocks.{block}.{our}", f"dpt.encoder.layer.{block}.{their}") for our, their in BLOCK]
    for level in range(1, 5):
        names += [(f"scratch.refinenet{level}.{our}", f"neck.fusion_stage.layers.{4 - level}.{their}")
                  for our, their in FUSION]
    return [*names, (f"{OURS}norm.", "dpt.layernorm."), *NECK, *HEAD]


def numbers(keys: Collection[str], pattern: str) -> list[tuple[str, ...]]:
    """What stands in the keys where the pattern has its groups, each once."""
    return sorted({match.groups() for match in map(re.compile(pattern, re.ASCII).match, keys) if match})
