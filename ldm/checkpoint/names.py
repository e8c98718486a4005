"""Where the names of foreign weights meet ours: prefixes, averaged copies and the entries that no model needs."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

Weight = TypeVar("Weight")

# Files written with newer versions of transformers lack the `text_model.` level of the CLIP text encoder.
PREFIXES = [
    (f"{stage}.transformer.{part}.", f"{stage}.transformer.text_model.{part}.")
    for stage in ("cond_stage_model", "conditioner.embedders.0")
    for part in ("embeddings", "encoder", "final_layer_norm")
]

# Numbers that the model computes by itself: their absence from a file is no loss.
COMPUTED = re.compile(
    r"(^|.*\.)("
    r"betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod"
    r"|log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod"
    r"|posterior_variance|posterior_log_variance_clipped|posterior_mean_coef[12]"
    r"|lvlb_weights|logvar|cond_ids|sigmas|position_ids|attn_mask)"
)

# Numbers that a config may take from a file of their own, so that a checkpoint need not have them.
OPTIONAL = re.compile(r"noise_augmentor\.data_(mean|std)")

# What training leaves in a file beside the weights that inference uses.
TRAINING_ONLY = re.compile(
    r"model_ema\..*"  # the averaged copy, when it is not asked for
    r"|(first_stage_model\.|cond_stage_model\.)?loss\..*"  # the autoencoder's discriminator and LPIPS
    # CLIP's head, which neither Stable Diffusion 1 nor the first encoder of XL uses.
    r"|(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?(logit_scale|text_projection(\.weight)?)"
    r"|embedder\.model\.transformer\..*"  # CLIP's text blocks, which pictures do not pass
    r"|embedding_manager\..*"  # textual inversion and DreamBooth
    r"|safety_checker\..*"
)

EMA = "model_ema."


def rename(state: Mapping[str, Weight], prefixes: Sequence[tuple[str, str]] = PREFIXES) -> dict[str, Weight]:
    """Give each weight the name that our modules use; the first matching prefix wins."""
    def new(key: str) -> str:
        return next((ours + key[len(theirs):] for theirs, ours in prefixes if key.startswith(theirs)), key)
    return {new(key): weight for key, weight in state.items()}


def has_ema(keys: Iterable[str]) -> bool:
    """Whether averaged weights are among the keys, not only the counters that every LitEma has."""
    return any(key.startswith(EMA) and key not in (EMA + "decay", EMA + "num_updates") for key in keys)


def select_ema(state: Mapping[str, Weight]) -> dict[str, Weight]:
    """Put the averaged weights in place of the plain ones.

    The copy of `model.diffusion_model.out.0.bias` is called `model_ema.diffusion_modelout0bias`: what is averaged is
    `model` in a diffusion model and the whole in an autoencoder, and a buffer's name cannot have dots.
    """
    def averaged(key: str) -> str:
        return EMA + key.removeprefix("model.").replace(".", "")
    return {key: state.get(averaged(key), weight) for key, weight in state.items() if not key.startswith(EMA)}
