"""What is saved by asking the network fewer times, and what it costs.

  python -m benchmarks.fewer                       the model of the shapes world, with its exact score
  python -m benchmarks.fewer --ckpt FILE --n 2     another one

Of each way to draw the same prompts from the same noise are told: evaluations of the network a picture (two a step with
guidance), processor time a picture by that of 50 PLMS steps, and how far the latents are from those of 200 DDIM steps
with guidance everywhere, ||a - b|| / ||b||. Random weights say how long a picture takes, nothing of its quality.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.weights import ROOT
from ldm.data import shapes
from ldm.errors import LdmError
from ldm.evaluation.measures import per_cent
from ldm.evaluation.shapes import score
from ldm.generation.loading import Chosen, choose
from ldm.generation.noise import NoiseSource
from ldm.generation.options import PRECISIONS, SHIPPED, ModelOptions
from ldm.generation.pipeline import Picture, Pipeline
from ldm.generation.request import Request
from ldm.memory import DTYPES, keep_freed_memory, pick_device, pick_precision, place
from ldm.models.load import load_model

REFERENCE = {"sampler": "ddim", "steps": 200}
INTERVAL = {"guidance_interval": "0.28,5.4"}
WAYS: dict[str, dict[str, Any]] = {
    "plms, 50 steps": {"sampler": "plms", "steps": 50},
    "plms, 25 steps": {"sampler": "plms", "steps": 25},
    "dpmpp_2m, 20 steps": {"sampler": "dpmpp_2m", "steps": 20},
    "dpmpp_2m, 15 steps": {"sampler": "dpmpp_2m", "steps": 15},
    "plms, 50 steps, guided in 0.28,5.4": {"sampler": "plms", "steps": 50, **INTERVAL},
    "plms, 50 steps, half of the tokens merged": {"sampler": "plms", "steps": 50, "token_merging": 0.5},
    "dpmpp_2m, 20 steps, guided in 0.28,5.4": {"sampler": "dpmpp_2m", "steps": 20, **INTERVAL},
}
PROMPTS = "a photograph of an astronaut riding a horse", "a castle at dusk", "a red fox in the snow", "a bowl of fruit"
BATCH = 4


class Drawing:
    """A model, its prompts, and what drawing them took."""

    def __init__(self, chosen: Chosen, options: ModelOptions, n: int, side: int | None, seed: int):
        device = pick_device(options.device)
        precision = pick_precision(options.precision, device)
        model = load_model(chosen.config, chosen.file(), dtype=DTYPES[precision], layout=torch.channels_last)
        self.pipeline = Pipeline(place(model, device), chosen.geometry, precision)
        self.captions = [shapes.sample_caption(Random(f"{seed}/fewer/{i}"), "all") for i in range(n)]
        self.exact = chosen.grammar is not None
        texts = list(map(str, self.captions)) if self.exact else [PROMPTS[i % len(PROMPTS)] for i in range(n)]
        self.requests = [
            Request(text, seed=seed + i, seed_mode="image", width=side, height=side) for i, text in enumerate(texts)]
        self.asked = 0
        model.model.register_forward_pre_hook(self._count)

    def _count(self, module, inputs: tuple) -> None:
        self.asked += len(inputs[0])

    def __call__(self, changes: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """Draw every prompt with these settings: what it took and how it came out, and the latents (n, c, h, w)."""
        requests, n = [replace(one, **changes) for one in self.requests], len(self.requests)
        latents, outcomes = [], []
        self.asked, begun = 0, time.process_time()
        for first in range(0, n, BATCH):
            some, seen = requests[first:first + BATCH], []
            noise = NoiseSource(self.pipeline.model.device).of(some)
            outcomes += self.pipeline.generate(some, noise, lambda x, *_, seen=seen: seen.append(x.clone()))
            latents.append(seen[-1])
        told = {"evaluations": self.asked / n, "seconds": (time.process_time() - begun) / n}
        if self.exact:
            told["right"] = per_cent(
                isinstance(one, Picture) and score(one.image, caption).right
                for one, caption in zip(outcomes, self.captions, strict=True))  # fmt: skip
        return told, torch.cat(latents)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=str(ROOT / SHIPPED), metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--config", metavar="YAML")
    parser.add_argument("--n", type=int, default=4, metavar="N", help="pictures (default: %(default)s)")
    parser.add_argument("--side", type=int, metavar="PIXELS", help="(default: the model's own)")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    args = parser.parse_args()
    options = ModelOptions(config=args.config, ckpt=args.ckpt, device=args.device, precision=args.precision)
    keep_freed_memory()
    try:
        drawing = Drawing(choose(options), options, args.n, args.side, args.seed)
        told, wanted = drawing(REFERENCE)
    except LdmError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    rows = [{"way": "ddim, 200 steps", **told, "error": 0.0}]
    for way, changes in WAYS.items():
        told, latents = drawing(changes)
        rows.append({"way": way, **told, "error": float((latents - wanted).norm() / wanted.norm())})
    usual = next(row["seconds"] for row in rows if row["way"] == next(iter(WAYS)))
    sys.stdout.write("| way | evaluations | time by plms 50 | apart | exact score |\n|---|---|---|---|---|\n")
    for row in rows:
        right = f"{row['right']:.1f} %" if "right" in row else ""
        sys.stdout.write(f"| {row['way']} | {row['evaluations']:.1f} | {row['seconds'] / usual:.2f} | "
                         f"{row['error']:.3f} | {right} |\n")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"machine": describe(), "options": vars(args), "rows": rows}, indent=1,
                                        default=str))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
