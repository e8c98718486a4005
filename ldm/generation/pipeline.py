"""A loaded model and how it runs: one batch of requests in, finished pictures out."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ldm import sampling
from ldm.errors import NumericalError, RequestError
from ldm.generation import measures, stages
from ldm.generation.geometry import Geometry
from ldm.generation.inputs import Given, Inputs, read_inputs
from ldm.generation.noise import Noise
from ldm.generation.request import Request, interval
from ldm.generation.safe import strength
from ldm.generation.words import Known
from ldm.image.depth import to_depth
from ldm.image.io import to_image
from ldm.memory import as_out_of_memory, autocast
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.merging import FEWEST, merging

logger = logging.getLogger(__name__)

OnStep = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Picture:
    """One picture, the request that it answers, and the words of its prompt that the text encoder could not take.

    depth: its depth map of 16 bits, from models that draw one.
    """

    image: Image.Image
    request: Request
    cut: str = ""
    depth: Image.Image | None = None


# How an upscaler draws latents again: as its authors do.
ENLARGING = {"sampler": "euler", "steps": 20, "scale": 1.0}


def enlarging(request: Request) -> Request:
    """What an upscaler is asked for after a request: the same prompt, by ENLARGING."""
    same = {name: getattr(request, name) for name in ("prompt", "prompt_weights", "long_prompt", "upscale", "tile")}
    return Request(**same, **ENLARGING)


class Pipeline:
    """Draws batches with one model, or two that meet in the latent. The requests of a batch differ in prompts, seeds
    and classes alone.

    refiner: the model of the last levels (Podell et al. 2023, section 2.5), on the latents and levels of the first.
    upscaler: the one that draws the finished latents again, with larger sides, where a request asks for that.
    compiled: whether the denoisers are.
    """

    def __init__(
        self, model: LatentDiffusion, geometry: Geometry, precision: str = "full",
        refiner: LatentDiffusion | None = None, upscaler: "Pipeline | None" = None, compiled: bool = False,
    ):
        self.upscaler = upscaler
        self.compiled = compiled
        self.models = [model] if refiner is None else [model, refiner]
        self.model = model
        self.geometry = geometry
        self.precision = precision
        self.schedule = sampling.Schedule(model.alphas_cumprod)
        self.known: Known = {}
        self.known_to_refiner: Known = {}
        self._paths: dict[tuple, sampling.Tail] = {}

    @property
    def loaded(self) -> list[LatentDiffusion]:
        """Every model that is drawn with."""
        return [*self.models, *(self.upscaler.loaded if self.upscaler else [])]

    def check(self, request: Request) -> None:
        """Raise RequestError for what the models cannot draw. They may be on the meta device, without their weights."""
        for model in self.models:
            stages.check(model, request)
        encoders = (model.cond_stage_model for model in self.models)
        measures.check(request, [key for encoder in encoders for key in getattr(encoder, "measures", ())])
        (self.upscaler or self).geometry.check_upscale(request, beside=self.upscaler is not None)
        if request.token_merging and self.compiled:
            raise RequestError("--token_merging changes the layers that --compile compiles: leave one of them out")
        read_inputs(request, self.geometry)
        self.path(request)

    @torch.inference_mode()
    def generate(
        self, batch: Sequence[Request], draw: Noise, on_step: OnStep = lambda x, x0: None
    ) -> list[Picture | NumericalError]:
        """Sample and decode a batch; after each step `on_step` is called with the latents (b, c, h, w), and with
        what the last evaluation of the network took for the clean ones.

        A picture that came to nothing but NaN or infinity is an error in its place. Raises RequestError, OutOfMemory.
        """
        device = self.model.device
        inputs = read_inputs(batch[0], self.geometry)
        given, shape = inputs.tensors(device), self.geometry.latent(*inputs.size)
        what = f"a batch of {len(batch)}" if len(batch) > 1 else "a picture"
        too_much = f"not enough memory on {device} for {what} at {inputs.width}x{inputs.height}"
        with as_out_of_memory(too_much), autocast(self.precision, device):
            steps = len(self.path(batch[0]).levels) - 1
            told = [stages.condition(model, batch, given, shape[1:], steps, draw, known)
                    for model, known in zip(self.models, (self.known, self.known_to_refiner))]
            latents = self._sample(batch, told, given, shape, draw, on_step)
            last = self.upscaler if self.upscaler and batch[0].upscale else self
            if last is not self:
                latents = last.enlarge(batch, latents, draw, on_step)
            cuts = told[0].cut or [""] * len(batch)
            # One by one, for the memory of a single picture.
            return [last._picture(*one, inputs) for one in zip(latents.split(1), batch, cuts, strict=True)]

    def enlarge(self, batch: Sequence[Request], latents: Tensor, draw: Noise, on_step: OnStep) -> Tensor:
        """Draw latents (b, c, h, w), which another model has made of the batch, anew at larger sides."""
        batch = [enlarging(request) for request in batch]
        shape = latents.shape[1], *(side * self.geometry.enlarges for side in latents.shape[2:])
        steps = self.moves(batch[0])
        told = stages.condition(self.model, batch, Given(latent=latents), shape[1:], steps, draw, self.known)
        return self._sample(batch, [told], Given(), shape, draw, on_step)

    def moves(self, request: Request) -> int:
        """How many steps the walk of a request takes, an upscaler's included."""
        more = self.upscaler.moves(enlarging(request)) if self.upscaler and request.upscale else 0
        return len(self.path(request).levels) - 1 + more

    def _picture(self, latent: Tensor, request: Request, cut: str, inputs: Inputs) -> Picture | NumericalError:
        try:
            pixels = stages.decode(self.model, latent).numpy()
            drawn = to_image(pixels[..., :3])
            depth = to_depth(pixels[..., 3:]) if pixels.shape[-1] > 3 else None
        except NumericalError as error:
            return error
        return Picture(inputs.restore(drawn), request, cut, depth)

    def path(self, request: Request) -> sampling.Tail:
        """The level that a request starts from, and those that it walks down: one fewer moves than levels."""
        strength = request.strength if request.init_img else 1.0
        way = request.sampler, request.steps, request.schedule
        if (*way, strength) not in self._paths:
            self._paths[(*way, strength)] = sampling.tail(sampling.levels(self.schedule, *way), strength, *way)
        return self._paths[(*way, strength)]

    def legs(self, request: Request, levels: Sequence[sampling.Level]) -> Iterator[Sequence[sampling.Level]]:
        """The part of the levels that each model walks."""
        if len(self.models) == 1:
            return iter([levels])
        return iter(sampling.cut(levels, request.refine_from, len(self.schedule)))

    def _sample(
        self,
        batch: Sequence[Request],
        told: Sequence[stages.Condition],
        given: Given,
        shape: tuple[int, int, int],
        draw: Noise,
        on_step: OnStep,
    ) -> Tensor:
        """Walk from noise, or from a noised picture, to the latents (b, c, h, w) of the batch."""
        request, model = batch[0], self.model
        start, levels = self.path(request)
        away = sampling.Away(*strength(request.safe)) if request.safe else None
        guidance = sampling.Guidance(request.scale, request.image_scale, away)
        guided = (-math.inf, math.inf) if request.guidance_interval is None else interval(request.guidance_interval)
        blending = given.mask is not None and model.model.conditioning_key not in ("hybrid", "concat")
        clean = stages.first_latent(model, given.image) if start.alpha or blending else 0.0
        keep = functional.interpolate(given.mask, size=shape[1:]) if blending else None

        like = torch.empty(len(batch), *shape, device=model.device)
        x = start.alpha * clean + start.sigma * draw.start(like)
        if blending and len(levels) > 1:
            x = stages.blend(clean, x, keep, levels[0], draw(x))
        options = {"eta": request.eta, "draw": draw}
        if request.sampler == "dpm_solver":
            options |= {"order": request.solver_order, "method": request.solver_method}
        sampler = sampling.SAMPLERS[request.sampler]
        x0, done = x, 0

        def look(x: Tensor, level: sampling.Level) -> sampling.Prediction:
            nonlocal x0
            seen = denoise(x, level)
            x0 = seen.x0
            return seen

        for model, condition, leg in zip(self.models, told, self.legs(request, levels), strict=True):
            apply_model = model.apply_model
            if self.geometry.enlarges > 1 and request.tile:
                apply_model = sampling.tiled(apply_model, *self.geometry.tile(request.tile))
            roles = condition.at(done).roles
            denoise = sampling.Denoiser(sampling.ask(apply_model, roles), model.parameterization, guidance, guided)
            moves = sampler(look, x, leg, self.schedule, **options)
            with merging(model.model, request.token_merging) as mergers:
                for x, level in zip(moves, leg[1:], strict=True):
                    done += 1
                    if blending and level is not levels[-1]:
                        x.copy_(stages.blend(clean, x, keep, level, draw(x)))
                    on_step(x, x0)
                    if now := condition.later.get(done):
                        denoise.ask = sampling.ask(apply_model, now.roles)
            if request.token_merging and not any(one.used for one in mergers):
                logger.warning("--token_merging changed nothing: no self-attention is over %d tokens or more", FEWEST)
        if away and away.calls <= away.warmup:
            logger.warning("--safe %s begins after %d evaluations of the network, but the walk had only %d: it changed "
                           "nothing", request.safe, away.warmup, away.calls)
        return x
