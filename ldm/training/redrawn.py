"""Noise, and the latents of what a model makes of it once that is redrawn as its caption asks.

A model that was shown noised drawings knows what each may have been, but from noise it has to choose, and what it
settles on wavers. Trained on pairs of a noise and the drawing that it leads to, it is told what to choose, and its way
becomes straight. This is reflow (Liu et al. 2022, "Flow Straight and Fast", section 2.2) but for the end of each pair,
which is put right: what the caption names, with true outlines and colours, in the places that the model chose.
"""

from collections.abc import Iterable, Mapping
from random import Random

import numpy as np
import torch
from torch.nn import Module

from ldm.data.latents import CachedLatents, Examples
from ldm.data.shapes import RELATIONS, Scene, Thing, allowed, draw, holds, object_masks, parse, scene_for
from ldm.evaluation.shapes import fitted, read
from ldm.training.latent import pictures
from ldm.util import instantiate_from_config


class RedrawnLatents(CachedLatents):
    """Cached latents, each with the noise that leads to them: {image, caption, noise: float32 (h, w, c)}.

    The captions are those of `source`, but what is encoded is what `model`, a trained LatentDiffusion of the shapes
    world, draws of each, redrawn. It draws from noise that depends on the seed alone, by so many `steps` of DDIM at a
    guidance `scale`.
    """

    def __init__(self, *args, model: Mapping, seed: int = 0, scale: float = 3.0, steps: int = 25, **kwargs):
        self.model, self.seed, self.scale, self.steps = model, seed, scale, steps
        super().__init__(*args, **kwargs)
        self.noise = np.load(self.folder / "noise.npy", mmap_mode="r")

    def examples(self, batches: Iterable[Mapping], first_stage: Module, start: int) -> Examples:
        """The noise, the moments of what it leads to once that is redrawn, and the captions."""
        model = instantiate_from_config(self.model).eval().to(self.device, memory_format=torch.channels_last)
        shape = (model.channels, model.image_size, model.image_size)
        with model.ema_scope():
            for batch in batches:
                texts = batch["caption"]
                numbers = range(start, start := start + len(texts))
                noise = np.stack([np.random.default_rng((self.seed, number)).standard_normal(shape, np.float32)
                                  for number in numbers])
                with torch.autocast(self.device.type, torch.bfloat16):
                    drawn = pictures(model, texts, self.scale, self.steps, torch.from_numpy(noise).to(self.device))
                ends = [draw(redrawn(picture, text, Random(f"{self.seed}/{number}")), side=len(picture))
                        for picture, text, number in zip(drawn, texts, numbers)]
                moments = self.encode(first_stage, torch.from_numpy(np.stack(ends)).float() / 127.5 - 1)
                yield {"moments": moments, "noise": np.moveaxis(noise, 1, -1)}, texts

    def __getitem__(self, index: int) -> dict:
        return super().__getitem__(index) | {"noise": self.noise[index].astype(np.float32)}


def redrawn(picture: np.ndarray, caption: str, rng: Random) -> Scene:
    """The scene of a caption with its objects where a picture has some, whatever they look like.

    picture: uint8 (h, w, 3). Where it shows fewer or more objects than are named, or in no such places, any scene is
    drawn by `rng`, as if it had shown nothing.
    """
    wanted, seen = parse(caption), read(picture).objects
    if len(seen) != len(wanted.objects):
        return scene_for(wanted, rng)
    if wanted.relation:
        axis, sign = RELATIONS[wanted.relation]
        seen = sorted(seen, key=lambda thing: sign * (thing.x, thing.y)[axis])
    things = tuple(allowed(fitted(thing, noun)) for thing, noun in zip(seen, wanted.objects))
    scene = Scene(wanted.background, things, wanted.relation, light=light(picture, things))
    apart = object_masks(scene).sum(axis=0).max() <= 1
    return scene if apart and (not wanted.relation or holds(wanted.relation, *things)) else scene_for(wanted, rng)


def light(picture: np.ndarray, things: tuple[Thing, ...]) -> float:
    """Where the light of a picture (h, w, 3) comes from, in degrees, by the slope of its background."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[:height, :width]
    around = [np.hypot(x / width - thing.x, y / height - thing.y) <= 0.75 * thing.span for thing in things]
    free = ~np.any(around, axis=0)
    places = np.stack([x[free], y[free], np.ones(free.sum())], axis=-1)
    (across, down, _), *_ = np.linalg.lstsq(places, picture.mean(axis=-1)[free], rcond=None)
    return float(np.rad2deg(np.arctan2(-down, across)) % 360)
