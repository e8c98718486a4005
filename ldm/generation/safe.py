"""Safe Latent Diffusion as it is asked for: a strength by name or by numbers. Standard library only."""

import math
from typing import NamedTuple

from ldm.errors import RequestError

# What Schramowski et al. 2023 keep pictures away from.
CONCEPT = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, "
    "bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, "
    "brutality, cruelty"
)


class Strength(NamedTuple):
    """How far to keep from a concept, as `sampling.Away` takes it; warmup counts evaluations of the network."""

    scale: float
    warmup: int
    threshold: float
    momentum_scale: float
    beta: float


# As diffusers has them; of weak, the paper's scale is 200.
STRENGTHS = {
    "weak": Strength(20.0, 15, 0.0, 0.0, 0.0),
    "medium": Strength(1000.0, 10, 0.01, 0.3, 0.4),
    "strong": Strength(2000.0, 7, 0.025, 0.5, 0.7),
    "max": Strength(5000.0, 0, 1.0, 0.5, 0.7),
}


def strength(text: str) -> Strength:
    """The strength that a word or five numbers with commas between them ask for. Raises RequestError."""
    if text in STRENGTHS:
        return STRENGTHS[text]
    try:
        scale, warmup, *others = text.split(",")
        asked = Strength(float(scale), int(warmup), *map(float, others))
    except (TypeError, ValueError):  # too few or too many of them, or no numbers
        asked = None
    if asked is None or not all(map(math.isfinite, asked)) or asked.warmup < 0 or not 0 <= asked.beta <= 1:
        raise RequestError(f"safe must be {', '.join(STRENGTHS)} or five numbers (guidance scale, warm-up steps, "
                           "threshold, momentum scale, momentum beta from 0 to 1) such as 1000,10,0.01,0.3,0.4; "
                           f"got {text!r}")
    return asked
