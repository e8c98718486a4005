"""How a run is carried out: which model, on what, and where the pictures go. Standard library only."""

import math
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import RequestError
from ldm.generation.axes import read_axes
from ldm.generation.request import check_choice

PRECISIONS = ("auto", "full", "bf16", "fp16", "autocast")
MEMORIES = ("auto", "low", "lowest")
SAFETY_ACTIONS = ("auto", "off", "flag", "blur", "black")
# What the originals write into their pictures, the first by default; the last is that of XL, which is no text.
WATERMARKS = ("StableDiffusionV1", "SDV2", "0xb3ec907bb19e")
LATENT_UPSCALER = "models/ldm/sd-x2-latent-upscaler"  # a folder
INTERRUPTED = 130  # the exit code
AHEAD = 16  # batches: how far a row is looked for that can join another
REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = "models/ldm/shapes/model.safetensors"  # the small model that comes with the project


@dataclass(frozen=True)
class ModelOptions:
    """Which weights, read through which YAML, and where and in what precision they run.

    config: None takes the one beside the checkpoint, else the shipped one of the family that the checkpoint tells.
    use_ema: True for the averaged weights, False for the others, None for what the config says. lora: FILE or
    FILE:WEIGHT each, embedding: FILE or FILE:WORD each. refiner: the weights of a second model, which goes on where
    a request says so; its config is the one beside them, or as they tell. upscaler: those of a model that draws latents
    again with larger sides, where a request says so. compile: whether the denoisers are compiled.
    """

    config: str | None = None
    ckpt: str = "models/ldm/stable-diffusion-v1/model.ckpt"
    use_ema: bool | None = None
    device: str = "auto"
    precision: str = "auto"
    memory: str = "auto"
    lora: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    refiner: str | None = None
    upscaler: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("memory", self.memory, MEMORIES)
        for option in self.lora:
            weighted(option)


@dataclass(frozen=True)
class RunOptions:
    """How many pictures, in what groups, and what is done with each.

    batch_size: pictures sampled together. n_iter: how often the whole list of requests is gone through.
    n_rows: pictures in a row of the grid, 0 for the batch size. watermark: the text to embed, "" for none, None for
    that of the model's original.
    stop_on_error: end at the first picture that fails. go_on: with the run of the same rows that is in the folder.
    preview: steps from one preview to the next, 0 for none. xy: the axes of the grid, where the rows are its cells, row
    by row (`ldm.generation.axes`).
    """

    outdir: str = "outputs"
    batch_size: int = 3
    n_iter: int = 1
    n_rows: int = 0
    skip_grid: bool = False
    skip_save: bool = False
    watermark: str | None = None
    safety: str = "auto"
    stop_on_error: bool = False
    go_on: bool = False
    preview: int = 0
    xy: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("safety", self.safety, SAFETY_ACTIONS)
        read_axes(self.xy)
        for name, low in (("batch_size", 1), ("n_iter", 1), ("n_rows", 0), ("preview", 0)):
            if getattr(self, name) < low:
                spelled = "the pictures in a batch" if name == "batch_size" else name
                raise RequestError(f"{spelled} must be at least {low}, got {getattr(self, name)}")


def weighted(option: str) -> tuple[str, float]:
    """The file and the weight, 1 where it is silent, of a --lora option. Raises RequestError."""
    file, tail = cut(option)
    try:
        weight = float(tail or 1)
    except ValueError:
        return option, 1.0
    if not math.isfinite(weight):
        raise RequestError(f"the weight of a LoRA must be a finite number, got {option!r}; 1 is usual, 0 is none")
    return file, weight


def learned(option: str) -> tuple[str, str | None]:
    """The file and the word, None for the file's own, of an --embedding option."""
    file, tail = cut(option)
    return file, tail or None


def cut(option: str) -> tuple[str, str]:
    """A file, and what follows it after a colon; a colon further up a path is a part of it."""
    file, _, tail = option.rpartition(":")
    return (file, tail.strip()) if file and not set("/\\") & set(tail) else (option, "")


def find(path: str) -> Path:
    """The file at `path`: in the working folder, else in the repository, so that scripts run from anywhere."""
    given = Path(path).expanduser()
    if not given.exists() and not given.is_absolute() and (REPOSITORY / given).exists():
        return REPOSITORY / given
    return given


def find_checkpoint(options: ModelOptions) -> Path:
    """The weights that are meant: those that ship with the project where no others are named or at the usual place."""
    named = find(options.ckpt)
    if options.ckpt == ModelOptions.ckpt and options.config is None and not named.exists():
        shipped = find(SHIPPED)
        return shipped if shipped.exists() else named
    return named
