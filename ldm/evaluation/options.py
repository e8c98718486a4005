"""What an evaluation is asked to do: every default, and the checks that need no model. Standard library only."""

from dataclasses import dataclass
from typing import NamedTuple

from ldm.errors import RequestError
from ldm.generation.request import MAX_SEED, MAX_STEPS, SAMPLERS, check_choice, check_range

MEASURES = ("curve", "exact", "autoencoder", "img2img", "inpaint")
FEATURES = ("auto", "inception", "clip")
SHAPES = "shapes"  # names the shapes world where a file or folder could stand


class Way(NamedTuple):
    """A sampler and its number of steps."""

    sampler: str
    steps: int

    def __str__(self) -> str:
        return f"{self.sampler}:{self.steps}"

    @classmethod
    def parse(cls, text: str) -> "Way":
        """Read "plms:50". Raises RequestError."""
        sampler, _, steps = text.partition(":")
        check_choice("sampler", sampler, SAMPLERS)
        if not steps.isdecimal():
            raise RequestError(f"a way to sample is a sampler and its steps, such as plms:50, got {text!r}")
        check_range("steps", int(steps), 1, MAX_STEPS)
        return cls(sampler, int(steps))


@dataclass(frozen=True)
class EvaluationOptions:
    """The measures to take, and of what.

    n: captions, of each set where there are several. samplers, scale: None for what each measure takes by itself.
    captions, reference: a file, a folder of pictures or an .npz, or `SHAPES`. features, inception, clip: what the
    distance and the CLIP score are taken with. Raises RequestError.
    """

    measures: tuple[str, ...] = ("curve",)
    n: int = 500
    captions: str = SHAPES
    scales: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)  # of the original's figure
    scale: float | None = None
    samplers: tuple[str, ...] | None = None
    seed: int = 42
    reference: str | None = None
    n_reference: int = 2000
    features: str = "auto"
    inception: str | None = None
    clip: str | None = None
    outdir: str = "outputs/evaluation"
    batch_size: int = 10

    def __post_init__(self) -> None:
        for name in self.measures:
            check_choice("measure", name, MEASURES)
        check_choice("features", self.features, FEATURES)
        for name, low in (("n", 2), ("n_reference", 2), ("batch_size", 1)):
            check_range(name, getattr(self, name), low, 10**9)
        check_range("seed", self.seed, 0, MAX_SEED)
        self.ways("")
        if "curve" in self.measures and self.captions != SHAPES and self.reference is None:
            raise RequestError("the distance needs pictures to compare with: name a folder of them, or an .npz that "
                               "an evaluation has written, with --reference")

    def ways(self, *default: str) -> list[Way]:
        """How to sample, where nothing else is asked for as by `default`."""
        return [Way.parse(text) for text in self.samplers or default if text]
