"""What one picture is asked to be: every default, and every check that needs no model. Standard library only."""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ldm.errors import RequestError
from ldm.generation.safe import CONCEPT, strength

SAMPLERS = (
    "plms", "ddim", "ddpm", "dpm_solver", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "dpmpp_2s_a",
    "euler", "euler_a", "heun", "lms", "dpm2", "dpm2_a", "unipc",
)
ETA_SAMPLERS = ("ddim",)
SCHEDULES = ("default", "karras", "exponential", "trailing")
SEED_MODES = ("run", "image")
LONG_PROMPTS = ("cut", "chunk")
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
MIN_TILE, MAX_TILE = 16, 2**16
MOST_MERGED = 0.75  # of tokens: one of each 2x2 stays
UPSCALER_NOISE = 20  # the usual noise_level of an upscaler


@dataclass(frozen=True)
class Request:
    """One picture: what to draw, how to sample it, and what to start from. It checks itself when it is made.

    width, height: pixels, or None for the model's native size. strength: how much of `init_img` is noised away, 0 to 1.
    image_scale: of a picture that is edited as the prompt says, how closely it is followed; None where none is.
    depth_img: the depth of `init_img`, brighter where it is nearer, in place of what the model sees itself.
    upscale: how many times larger than `init_img` the picture is drawn, by a model that does that. tile: a small
    picture with a longer side is drawn in overlapping tiles of this side; 0 is never.
    varies: `init_img` is not drawn over but told as a whole, at any size. noise_level: of the noise in which a small
    picture, or what is seen in one that is varied, is told, in steps of its schedule; None is the model's usual one.
    prompt_weights: read the brackets of prompts, as `ldm.prompt` does; else they are text like any other.
    guidance_interval: "LO,HI", the noise levels between which `scale` counts; None is everywhere.
    token_merging: the share of the tokens that large self-attentions merge with others, 0 to MOST_MERGED; 0 is none.
    safe: how far to keep from `safe_concept`, as `ldm.generation.safe` reads it; None is not at all.
    seed_mode: "run" draws one noise for a whole batch on the sampling device, as CompVis does; "image" gives each
    picture a seed of its own, drawn on the CPU, for the same picture on any device and at any batch size.
    original_size, target_size: "WIDTHxHEIGHT", crop: "TOP,LEFT", and aesthetic_score are told to models that take
    them, of which None says what `ldm.generation.measures` has. refine_from: the share of the noise levels after which
    the refiner of the run, if it has one, goes on.
    Raises RequestError.
    """

    prompt: str = ""
    negative_prompt: str = ""
    sampler: str = "plms"
    schedule: str = "default"
    steps: int = 50
    eta: float = 0.0
    solver_order: int = 2
    solver_method: str = "multistep"
    scale: float = 7.5
    image_scale: float | None = None
    guidance_interval: str | None = None
    token_merging: float = 0.0
    seed: int = 42
    seed_mode: str = "run"
    fixed_code: bool = False
    width: int | None = None
    height: int | None = None
    long_prompt: str = "cut"
    prompt_weights: bool = False
    safe: str | None = None
    safe_concept: str = CONCEPT
    init_img: str | None = None
    mask: str | None = None
    depth_img: str | None = None
    upscale: int | None = None
    noise_level: int | None = None
    tile: int = 256
    strength: float = 1.0
    varies: bool = False
    class_label: int | None = None
    original_size: str | None = None
    crop: str | None = None
    target_size: str | None = None
    aesthetic_score: float | None = None
    refine_from: float = 0.8

    def __post_init__(self) -> None:
        check_text("prompt", self.prompt)
        check_text("negative_prompt", self.negative_prompt)
        check_text("safe_concept", self.safe_concept)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("seed_mode", self.seed_mode, SEED_MODES)
        check_choice("long_prompt", self.long_prompt, LONG_PROMPTS)
        check_choice("solver_method", self.solver_method, ("multistep", "singlestep"))
        check_choice("solver_order", self.solver_order, (2, 3))
        check_range("ddim_steps", self.steps, 1, MAX_STEPS)
        check_range("ddim_eta", self.eta, 0.0, 1.0)
        check_range("token_merging", self.token_merging, 0.0, MOST_MERGED)
        check_range("strength", self.strength, 0.0, 1.0)
        check_choice("scale_factor", self.upscale, (None, 2, 4))
        if self.noise_level is not None:
            check_range("noise_level", self.noise_level, 0, MAX_STEPS - 1)
        if self.tile:
            check_range("tile", self.tile, MIN_TILE, MAX_TILE)
        check_range("seed", self.seed, 0, MAX_SEED)
        if not math.isfinite(self.scale):
            raise RequestError(f"scale must be a finite number, got {self.scale}; 7.5 is usual, 1 means no guidance")
        if self.image_scale is not None and not math.isfinite(self.image_scale):
            raise RequestError(f"image_scale must be a finite number, got {self.image_scale}; 1.5 is usual")
        if self.safe is not None:
            strength(self.safe)
        if self.guidance_interval is not None:
            interval(self.guidance_interval)
            if self.safe is not None:
                raise RequestError("safe steers at every noise level: leave guidance_interval out with it")
        if self.eta and self.sampler not in ETA_SAMPLERS:
            raise RequestError(f"ddim_eta must be 0 with {self.sampler}, got {self.eta}; only ddim takes an eta")
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RequestError(f"{name} must be positive, got {value}; the model's native size needs no option")
        if self.varies and (self.mask or self.strength != 1.0):
            raise RequestError("a picture that is varied is not drawn over: leave --mask and --strength out")
        for name, mark in (("original_size", "x"), ("target_size", "x"), ("crop", ",")):
            if (value := getattr(self, name)) is not None:
                check_pair(name, value, mark)
        check_range("refine_from", self.refine_from, 0.0, 1.0)
        if self.aesthetic_score is not None:
            check_range("aesthetic_score", self.aesthetic_score, 0.0, 10.0)
        if self.mask and not self.init_img:
            raise RequestError("a mask needs the picture that it belongs to: give --init-img too")
        if self.depth_img and not self.init_img:
            raise RequestError("a depth map needs the picture that it belongs to: give --init-img too")

    @property
    def steers(self) -> bool:
        """Whether guidance needs to know what the network says without the prompt."""
        return self.scale != 1.0 or self.image_scale is not None or self.safe is not None

    def with_seed(self, seed: int) -> "Request":
        return replace(self, seed=seed)

    @classmethod
    def from_record(cls, record: dict) -> "Request":
        """Read back what `dataclasses.asdict` wrote. Raises RequestError on a field that does not exist here."""
        unknown = sorted(set(record) - {field.name for field in fields(cls)})
        if unknown:
            raise RequestError(f"this version does not know the settings {', '.join(unknown)}")
        return cls(**record)


def interval(text: str) -> tuple[float, float]:
    """The lowest and the highest noise level, as sigma / alpha, that "LO,HI" names. Raises RequestError."""
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise RequestError(
            f"guidance_interval must be two noise levels LO,HI such as 0.28,5.4, got {text!r}") from error
    if not 0 <= low < high:
        raise RequestError(f"guidance_interval must rise from its LO, 0 or more, to its HI, got {text!r}; try 0.28,5.4")
    return low, high


def check_text(name: str, text: str) -> None:
    """Reject what is no text: a byte of the command line that the terminal's encoding does not know."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} must be UTF-8, got {text!a}; set the terminal to UTF-8") from error


def check_choice(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise RequestError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Reject what is outside [low, high], not a number included."""
    if not low <= value <= high:
        raise RequestError(f"{name} must be from {low} to {high}, got {value}")


def check_pair(name: str, value: str, mark: str) -> None:
    """Reject what is not two whole numbers with a mark between them."""
    try:
        pair(value, mark)
    except ValueError as error:
        example = {"x": "1024x768 (width x height)", ",": "0,128 (top, left)"}[mark]
        raise RequestError(f"{name} must be two whole numbers such as {example}, got {value!r}") from error


def pair(text: str, mark: str) -> tuple[int, int]:
    """The two numbers that a mark stands between. Raises ValueError."""
    first, second = text.lower().split(mark)
    return int(first), int(second)


def check_side(name: str, value: int, step: int) -> None:
    """Reject an image side, in pixels, that the autoencoder and the UNet cannot halve evenly."""
    if value < step or value % step:
        near = max(step, round(value / step) * step)
        raise RequestError(f"{name} must be a positive multiple of {step}, got {value}; try {near}")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises RequestError where it cannot be read."""
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[:error.start].count(b"\n") + 1
        raise RequestError(f"{path} is not UTF-8 (line {line}); save it as UTF-8") from error
    except FileNotFoundError as error:
        raise RequestError(f"there is no prompt file {path}") from error
    except OSError as error:
        raise RequestError(f"cannot read the prompt file {path}: {error.strerror}") from error
