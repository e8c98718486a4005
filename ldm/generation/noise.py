"""Seeded Gaussian noise, in the order in which a sampler asks for it."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ldm.generation.request import Request


class Noise:
    """Called with a tensor (b, c, h, w), gives float32 noise of its shape on its device.

    One generator draws for whole batches, as CompVis does; one generator for each picture draws on the CPU, so that a
    picture is the same on any device and at any batch size. `history` is what has been drawn, run-length encoded as
    [b, c, h, w, count], from which `repeat` brings another Noise to the same point.
    """

    def __init__(self, generators: Sequence[torch.Generator], fixed_start: bool = False):
        self.generators = list(generators)
        self.history: list[list[int]] = []
        self.fixed_start = fixed_start
        self._starts: dict[torch.Size, Tensor] = {}

    def __call__(self, like: Tensor) -> Tensor:
        shape = list(like.shape)
        if self.history and self.history[-1][:-1] == shape:
            self.history[-1][-1] += 1
        else:
            self.history.append([*shape, 1])
        if len(self.generators) == 1:
            generator = self.generators[0]
            return torch.randn(shape, generator=generator, device=generator.device).to(like.device)
        return torch.stack([torch.randn(shape[1:], generator=one) for one in self.generators]).to(like.device)

    def start(self, like: Tensor) -> Tensor:
        """The noise that a batch starts from: with `fixed_start` the same for every batch of a size, else the next."""
        noise = self._kept(like)
        if noise is None:
            noise = self(like)
            if self.fixed_start:
                self._starts[like.shape[1:]] = noise
        return noise

    def repeat(self, history: Iterable[Sequence[int]]) -> None:
        """Draw what `history` says and throw it away, but for the starts: what comes first of its size is one."""
        for *shape, count in history:
            like = torch.empty(shape, device=self.generators[0].device)
            for _ in range(count):
                if self._kept(like) is None:
                    self.start(like)
                else:
                    self(like)

    def _kept(self, like: Tensor) -> Tensor | None:
        """The fixed start for latents of this size, where one has been drawn for as many."""
        noise = self._starts.get(like.shape[1:])
        return noise[:len(like)] if noise is not None and len(noise) >= len(like) else None

    def reach(self, history: Sequence[Sequence[int]]) -> None:
        """Draw what is missing until `history` is what has been drawn, from the start if something else has been."""
        *whole, last = self.history or [[]]
        following = history[len(whole):len(whole) + 1]
        ahead = following and list(following[0][:-1]) == last[:-1] and following[0][-1] >= last[-1]
        if self.history and not (list(map(list, history[:len(whole)])) == whole and ahead):
            for generator in self.generators:
                generator.manual_seed(generator.initial_seed())
            self.history, self._starts = [], {}
        if not self.history:
            self.repeat(history)
        else:
            *shape, count = history[len(whole)]
            self.repeat([[*shape, count - last[-1]], *history[len(whole) + 1:]])


class NoiseSource:
    """The noise of each batch of a run."""

    def __init__(self, device: torch.device):
        self.device = device
        self._runs: dict[tuple[int, bool], Noise] = {}

    def of(self, batch: Sequence[Request]) -> Noise:
        """By seed_mode: the generator of the run, which goes on from batch to batch, or one for each picture."""
        first = batch[0]
        if first.seed_mode == "image":
            return Noise([torch.Generator().manual_seed(request.seed) for request in batch])
        key = first.seed, first.fixed_code
        if key not in self._runs:
            self._runs[key] = Noise([torch.Generator(self.device).manual_seed(first.seed)], first.fixed_code)
        return self._runs[key]
