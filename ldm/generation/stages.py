"""The stages of a picture: its condition, the latent that it starts from, its decoding."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm import sampling
from ldm.errors import NumericalError, RequestError
from ldm.generation import measures
from ldm.generation.inputs import UPSCALES, Given
from ldm.generation.noise import Noise
from ldm.generation.request import UPSCALER_NOISE, Request, check_range
from ldm.generation.words import Known, Words, script
from ldm.models.diffusion.ddpm import (
    ImageEmbeddingConditionedLatentDiffusion,
    LatentDepth2ImageDiffusion,
    LatentDiffusion,
    LatentEditDiffusion,
    LatentInpaintDiffusion,
    LatentUpscale2xDiffusion,
    LatentUpscaleDepthDiffusion,
    LatentUpscaleDiffusion,
)
from ldm.modules.encoders.image import ImageEncoder
from ldm.modules.midas.api import fit_depth

logger = logging.getLogger(__name__)

REPAINTS = "this model repaints a part of a picture: use scripts/inpaint.py with --init-img and --mask"
VARIES = "this model draws variations of a picture: use scripts/variation.py with --init-img"
EDITS = "this model edits a whole picture as the prompt says: use scripts/edit.py with --init-img"
UPSCALES_PAIR = ("this model enlarges a picture with its depth: use scripts/upscale.py with --init-img, --depth-img "
                 "and --scale_factor 2")
KEEPS_DEPTH = "this model keeps the depth of a picture: use scripts/depth2img.py with --init-img"


@dataclass(frozen=True)
class Condition:
    """What the denoiser is told, with and without guidance, and what it is told instead from a `later` step on.

    cut: the words of each prompt that did not fit. image: what is told of a picture to edit, without the prompt.
    concept: what to keep away from.
    """

    positive: Tensor | dict | None
    negative: Tensor | dict | None
    cut: tuple[str, ...] = ()
    later: Mapping[int, "Condition"] = field(default_factory=dict)
    image: dict | None = None
    concept: Tensor | dict | None = None

    def at(self, step: int) -> "Condition":
        """What holds from a step on until the next of `later`."""
        begun = [first for first in self.later if first <= step]
        return self.later[max(begun)] if begun else self

    def beside(
        self, given: Mapping[str, Any], without: Mapping[str, Any] | None = None, edits: bool = False
    ) -> "Condition":
        """This, and at every step also what is `given`, or what comes in its place where guidance leads away from.

        given, without: entries of the dict that DiffusionWrapper takes. Entries that are there already grow: lists by
        entries, tensors (b, d) by columns. edits: what is given is also told without the prompt, as `image`.
        """
        without = given if without is None else without
        image = self.negative if edits else self.image
        roles = (self.positive, given), (self.negative, without), (image, given), (self.concept, given)
        positive, negative, image, concept = (None if told is None else grown(told, more) for told, more in roles)
        later = {step: now.beside(given, without, edits) for step, now in self.later.items()}
        return Condition(positive, negative, self.cut, later, image, concept)

    @property
    def roles(self) -> sampling.Told:
        """All of it as guidance takes it."""
        return sampling.Told(self.negative, self.image, self.positive, self.concept)


@dataclass(frozen=True)
class Beside:
    """What a kind of model is told beside a prompt.

    tell: (model, batch, what is given, the size (h, w) of the latents, noise) -> what DiffusionWrapper takes beside
    c_crossattn; fits: whether a request has what that needs; advice: what to say where it has not; check: raises
    RequestError for what this very model does not take; without: what is told in place of that where guidance leads
    away from it.
    """

    tell: Callable[[LatentDiffusion, Sequence[Request], Given, tuple[int, int], Noise], dict]
    fits: Callable[[Request], bool]
    advice: str
    check: Callable[[LatentDiffusion, Request], None] = lambda model, request: None
    without: Callable[[dict], dict] = lambda told: told


def beside_prompt(model: LatentDiffusion) -> Beside | None:
    """What this model is told beside a prompt, None where that is not known here."""
    return next((beside for kind, beside in BESIDE.items() if isinstance(model, kind)), None)


def grown(told: Tensor | Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """A condition, as DiffusionWrapper takes it, and more entries."""
    whole = dict(told) if isinstance(told, Mapping) else {"c_crossattn": [told]}
    for key, entry in more.items():
        if key not in whole:
            whole[key] = entry
        elif isinstance(entry, Tensor):
            whole[key] = torch.cat([whole[key], entry], dim=1)
        else:
            whole[key] = [*whole[key], *entry]
    return whole


def check(model: LatentDiffusion, request: Request) -> None:
    """Raise RequestError for a request that lacks what this model needs, or has what it cannot take."""
    encoder, key = model.cond_stage_model, model.model.conditioning_key
    classes = getattr(encoder, "n_classes", 0)
    if key == "concat" and request.mask is None:
        raise RequestError(REPAINTS)
    beside = beside_prompt(model)
    if key == "hybrid" and beside is None:
        raise RequestError(f"it is not known here what {type(model).__name__} takes beside a prompt")
    if beside:
        if not beside.fits(request):
            raise RequestError(beside.advice)
        beside.check(model, request)
    if request.image_scale is not None and not isinstance(model, LatentEditDiffusion):
        raise RequestError("this model does not edit pictures as a prompt says: use scripts/img2img.py, or name an "
                           "InstructPix2Pix checkpoint with --ckpt")
    if request.depth_img and not isinstance(model, LatentDepth2ImageDiffusion | LatentUpscaleDepthDiffusion):
        raise RequestError("this model does not look at depth: leave --depth-img out, or name a depth-to-image "
                           "checkpoint with --ckpt")
    check_picture(model, request)
    if classes and request.class_label is None:
        raise RequestError(f"this model draws classes 0 to {classes - 1}: use scripts/sample_diffusion.py --classes N")
    if classes and not 0 <= request.class_label < classes:
        raise RequestError(f"this model draws classes 0 to {classes - 1}, got {request.class_label}")
    if not classes and request.class_label is not None:
        raise RequestError("this model has no classes: leave --classes out")
    if encoder is None or classes or key == "concat" or isinstance(encoder, ImageEncoder):
        if request.prompt or request.negative_prompt:
            option = "--prompt" if request.prompt else "--negative_prompt"
            drawn_from = key == "concat" or request.varies
            hint = f"leave {option} out" if drawn_from else "use scripts/sample_diffusion.py"
            raise RequestError(f"this model takes no prompt: {hint}")
        if request.safe:
            raise RequestError("this model takes no prompt, and so no concept to keep away from: leave --safe out")
    elif request.long_prompt == "chunk" and not hasattr(encoder, "encode_long"):
        raise RequestError(f"{type(encoder).__name__} cannot encode a prompt in chunks: use --long_prompt cut")


def check_picture(model: LatentDiffusion, request: Request) -> None:
    """Raise RequestError where a model that is told a picture as a whole gets none, or another model gets one."""
    if isinstance(model.cond_stage_model, ImageEncoder):
        if not varied(request):
            raise RequestError(VARIES)
        if request.noise_level is not None:
            raise RequestError("this model adds no noise to what it sees in a picture: leave --noise_level out")
    elif request.varies and not isinstance(model, ImageEmbeddingConditionedLatentDiffusion):
        raise RequestError("this model is not told what a picture shows: use scripts/img2img.py, or name a checkpoint "
                           "of image variations or Stable unCLIP with --ckpt")


def varied(request: Request) -> bool:
    return request.varies and request.init_img is not None


def condition(
    model: LatentDiffusion,
    batch: Sequence[Request],
    given: Given,
    size: tuple[int, int],
    steps: int,
    draw: Noise,
    known: Known | None = None,
) -> Condition:
    """Encode the prompts, classes or pictures that this model takes.

    size: that of the latents, (h, w); steps: how many are walked; draw: noise for what is told with some; known: the
    texts that have been encoded, to which these are added.
    Raises RequestError as `check` does.
    """
    for request in batch:
        check(model, request)
    key = model.model.conditioning_key
    if key == "concat":
        return Condition(concat_condition(model, given, len(batch)), None)
    if model.cond_stage_model is None:
        return Condition(None, None)
    if hasattr(model.cond_stage_model, "n_classes"):
        return class_condition(model, batch)
    if isinstance(model.cond_stage_model, ImageEncoder):
        seen = model.get_learned_conditioning(given.image).expand(len(batch), -1, -1)
        return Condition(seen, torch.zeros_like(seen) if batch[0].steers else None)
    told = text_condition(model, batch, steps, known)
    if kind := beside_prompt(model):
        beside = kind.tell(model, batch, given, size, draw)
        if "c_concat" in beside:
            beside["c_concat"] = [one.expand(len(batch), -1, -1, -1) for one in beside["c_concat"]]
        told = told.beside(beside, kind.without(beside), edits=batch[0].image_scale is not None)
    if getattr(model.cond_stage_model, "measures", ()):
        numbers = map(model.cond_stage_model.measure, measures.measures(batch[0], given.size))
        told = told.beside(*({"c_adm": vector.expand(len(batch), -1)} for vector in numbers))
    return told


def text_condition(
    model: LatentDiffusion, batch: Sequence[Request], steps: int, known: Known | None = None
) -> Condition:
    """Encode prompts, and their negatives where the scale asks for guidance: (b, tokens, channels) each."""
    texts = script(batch, steps)
    words = Words(model, chain.from_iterable(texts.values()), batch[0], known)
    count = len(batch)

    @cache
    def told(now: tuple[str, ...]) -> Condition:
        wanted, unwanted, concept = (now[start:start + count] for start in (0, count, 2 * count))
        return Condition(words(wanted), words.against(unwanted) if unwanted else None,
                         concept=words(concept) if concept else None)

    first, *later = (told(now) for now in texts.values())
    cut = tuple(max(map(words.cut, row), key=len) for row in islice(zip(*texts.values()), count))
    return replace(first, cut=cut, later=dict(zip(list(texts)[1:], later)))


def picture_vector(
    model: ImageEmbeddingConditionedLatentDiffusion,
    batch: Sequence[Request],
    given: Given,
    size: tuple[int, int],
    draw: Noise,
) -> dict:
    """What a picture shows, with noise of the level that is asked for, of each in the batch its own: (b, d)."""
    seen = model.embedder(given.image).float().expand(len(batch), -1)
    if model.noise_augmentor is None:
        return {"c_adm": seen}
    level = torch.full((len(batch),), batch[0].noise_level or 0, device=seen.device)
    return {"c_adm": model.augment(seen, noise_level=level, noise=draw(seen))}


def class_condition(model: LatentDiffusion, batch: Sequence[Request]) -> Condition:
    """Embed class labels; guidance steers away from the last class, which such models keep for "no class"."""
    encoder = model.cond_stage_model
    labels = [request.class_label for request in batch]

    def embed(classes: Sequence[int]) -> Tensor:
        return model.get_learned_conditioning({model.cond_stage_key: torch.tensor(classes, device=model.device)})

    nothing = embed([encoder.n_classes - 1] * len(labels)) if batch[0].scale != 1.0 else None
    return Condition(embed(labels), nothing)


def masked_latents(
    model: LatentInpaintDiffusion, batch: Sequence[Request], given: Given, size: tuple[int, int], draw: Noise
) -> dict:
    """The mask and the latent of the picture without its masked part, side by side: (1, 1 + c, h/f, w/f).

    The part to repaint is set to 0, mid grey, as the Stable Diffusion inpainting models were trained.
    """
    latent = first_latent(model, given.image * (given.mask < 0.5))
    parts = {"mask": functional.interpolate(given.mask, size=size), model.masked_image_key: latent}
    return {"c_concat": [torch.cat([parts[key] for key in model.concat_keys], dim=1)]}


def depth_of(
    model: LatentDepth2ImageDiffusion, batch: Sequence[Request], given: Given, size: tuple[int, int], draw: Noise
) -> dict:
    """The depth map that is given, or what the model sees in the picture: (1, 1, h/f, w/f) from -1, far, to 1, near."""
    depth, stage = given.depth, model.depth_model
    if depth is None:
        depth = run_stage(stage, lambda: stage(stage.prepare(given.image)), "the depth model")
    return {"c_concat": [fit_depth(depth, size)]}


def low_scale(
    model: LatentUpscaleDiffusion, batch: Sequence[Request], given: Given, size: tuple[int, int], draw: Noise
) -> dict:
    """The small picture (b, 3, h, w) with noise of a level, and that level (b,), which the network is told."""
    small = given.image.expand(len(batch), -1, -1, -1)
    asked = UPSCALER_NOISE if batch[0].noise_level is None else batch[0].noise_level
    level = torch.full((len(batch),), asked, device=small.device)
    return {"c_concat": [model.low_scale_model.q_sample(small, level, draw(small))], "c_adm": level}


def small_latent(
    model: LatentUpscale2xDiffusion, batch: Sequence[Request], given: Given, size: tuple[int, int], draw: Noise
) -> dict:
    """The latent of the small picture, or the one that another model drew, each place as often as it is enlarged."""
    latent = first_latent(model, given.image) if given.latent is None else given.latent
    return {"c_concat": [functional.interpolate(latent, size, mode="nearest")]}


def pair_latent(
    model: LatentUpscaleDepthDiffusion, batch: Sequence[Request], given: Given, size: tuple[int, int], draw: Noise
) -> dict:
    """The latent of the small picture and its depth, which have been resized to what is drawn.

    No noise is added to it; a network that asks for the level of some is told one all the same.
    """
    told: dict = {"c_concat": [first_latent(model, torch.cat([given.image, given.depth], dim=1))]}
    if model.model.conditioning_key == "hybrid-adm":
        told["c_adm"] = torch.full((len(batch),), UPSCALER_NOISE, device=given.image.device)
    return told


def enlarges(request: Request) -> bool:
    """Whether a request is for a larger copy of a whole picture, and no more."""
    plain = request.mask is None and not request.width and not request.height and request.strength == 1.0
    return request.upscale is not None and plain


def check_noise_level(model: LatentUpscaleDiffusion, request: Request) -> None:
    """Raise RequestError for a noise level that the model was not trained at."""
    if request.noise_level is not None:
        check_range("noise_level", request.noise_level, 0, model.low_scale_model.max_noise_level)


def check_no_noise_level(model: LatentDiffusion, request: Request) -> None:
    """Raise RequestError for a noise level where no noise is added to the small picture."""
    if request.noise_level is not None:
        raise RequestError("this model takes the small picture as it is: leave --noise_level out")


def concat_condition(model: LatentDiffusion, given: Given, count: int) -> Tensor:
    """As above for the latent-diffusion inpainting model: the latent first, the mask in {-1, 1}, and a black hole."""
    hole = (1 - given.mask) * (given.image + 1) - 1
    latent = model.cond_stage_model.encode(hole)
    small = functional.interpolate(given.mask * 2 - 1, size=latent.shape[-2:])
    return torch.cat([latent, small], dim=1).expand(count, -1, -1, -1)


def encode(model: LatentDiffusion, image: Tensor) -> Tensor:
    """The latent of a picture as the autoencoder gives it: the mean of its posterior, so that no noise is drawn.

    image: (b, 3, h, w) in [-1, 1] -> (b, c, h/f, w/f).
    """

    def run() -> Tensor:
        posterior = model.encode_first_stage(image)
        return posterior if isinstance(posterior, Tensor) else posterior.mode()

    return run_stage(model.first_stage_model, run)


def first_latent(model: LatentDiffusion, image: Tensor) -> Tensor:
    """The latent of a picture at the scale that diffusion works in."""
    return model.get_first_stage_encoding(encode(model, image))


def blend(clean: Tensor, x: Tensor, mask: Tensor, level: sampling.Level, noise: Tensor) -> Tensor:
    """Outside the mask, the given latent at this level of noise; inside, the one being sampled (mask 1 = sampled)."""
    return x * mask + (1 - mask) * (level.alpha * clean + level.sigma * noise)


def decode(model: LatentDiffusion, latent: Tensor) -> Tensor:
    """Decode one latent (1, c, h, w) to pixels (h*f, w*f, 3), or more channels where there is depth too, on the CPU.

    Raises NumericalError where it cannot be.
    """
    if not torch.isfinite(latent).all():
        raise NumericalError("the latents are not finite (NaN or infinity): try --precision full or a lower --scale; "
                             "if that does not help, the checkpoint is damaged")
    image = run_stage(model.first_stage_model, lambda: model.decode_first_stage(latent))
    if not torch.isfinite(image).all():
        raise NumericalError("the decoded picture is not finite: the checkpoint's autoencoder may be damaged")
    return image[0].permute(1, 2, 0).cpu()


def run_stage(stage: nn.Module, run: Callable[[], Tensor], name: str = "the autoencoder") -> Tensor:
    """What `run` makes with a stage of a model, in float32; where half precision overflows, made again in float32."""
    out = run().float()
    if torch.isfinite(out).all():
        return out
    device, dtype = out.device.type, next(stage.parameters()).dtype
    if dtype == torch.float32 and not torch.is_autocast_enabled(device):
        return out
    logger.warning("%s overflowed in half precision: running it again in float32", name)
    stage.float()
    try:
        with torch.autocast(device, enabled=False):
            return run().float()
    finally:
        stage.to(dtype)


BESIDE: dict[type[LatentDiffusion], Beside] = {
    LatentInpaintDiffusion: Beside(masked_latents, lambda request: request.mask is not None, REPAINTS),
    LatentDepth2ImageDiffusion: Beside(
        depth_of, lambda request: request.init_img is not None and request.mask is None, KEEPS_DEPTH),
    LatentUpscale2xDiffusion: Beside(small_latent, enlarges, UPSCALES, check_no_noise_level),
    LatentUpscaleDepthDiffusion: Beside(
        pair_latent, lambda request: enlarges(request) and request.depth_img is not None, UPSCALES_PAIR,
        check_no_noise_level),
    LatentUpscaleDiffusion: Beside(low_scale, enlarges, UPSCALES, check_noise_level),
    LatentEditDiffusion: Beside(
        lambda model, batch, given, size, draw: {"c_concat": [encode(model, given.image)]},
        lambda request: request.init_img is not None and request.image_scale is not None and request.mask is None,
        EDITS,
        without=lambda told: {"c_concat": [torch.zeros_like(one) for one in told["c_concat"]]},
    ),
    ImageEmbeddingConditionedLatentDiffusion: Beside(
        picture_vector, varied, VARIES, without=lambda told: {"c_adm": torch.zeros_like(told["c_adm"])}),
}
