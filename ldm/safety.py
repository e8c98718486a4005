"""The Stable Diffusion safety checker: does a picture lie too near to one of 17 concepts in CLIP's space?

It compares a picture's CLIP vector with fixed vectors (Rando et al. 2022), whose meaning its authors did not publish.
It is loaded when asked for, from this machine, and what it does to a picture is always told.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn.functional import normalize

from ldm.errors import CheckpointError, ConfigError, RequestError
from ldm.modules.blank import blank
from ldm.modules.encoders.clip import CLIP_MEAN, CLIP_STD, ClipConfig, ClipVisionTransformer, tower_config
from ldm.modules.encoders.files import MODELS, WEIGHTS, local_folder, pick, read_json, read_weights

PUBLISHED = "CompVis/stable-diffusion-safety-checker"
FOLDER = MODELS / "safety-checker"
ACTIONS = ("off", "flag", "blur", "black")


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is flagged, and the concepts that it is too near to, by their place in the checker's table."""

    flagged: bool
    concepts: tuple[str, ...] = ()


class SafetyNetwork(nn.Module):
    """CLIP's picture tower and the vectors to compare with, under the published checkpoint's names."""

    def __init__(self, config: ClipConfig, embed: int = 768, concepts: int = 17, special: int = 3):
        super().__init__()
        self.vision_model = ClipVisionTransformer(config)
        self.visual_projection = nn.Linear(config.width, embed, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(concepts, embed))
        self.special_care_embeds = nn.Parameter(torch.ones(special, embed))
        self.concept_embeds_weights = nn.Parameter(torch.ones(concepts))
        self.special_care_embeds_weights = nn.Parameter(torch.ones(special))

    def forward(self, pixels: Tensor) -> Tensor:
        """By how much each picture passes each concept's threshold: pixels (b, 3, s, s) -> (b, concepts).

        A score is a cosine less its threshold, to three places; near a special concept all thresholds are 0.01 lower.
        """
        vector = normalize(self.visual_projection(self.vision_model(pixels).pooler_output))
        special = vector @ normalize(self.special_care_embeds).T - self.special_care_embeds_weights
        strictness = 0.01 * (special.round(decimals=3) > 0).any(dim=1, keepdim=True)
        scores = vector @ normalize(self.concept_embeds).T - self.concept_embeds_weights
        return (scores + strictness).round(decimals=3)


class SafetyChecker:
    """The checker on one device: pictures in, a Verdict for each out."""

    def __init__(self, network: SafetyNetwork):
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def load(
        cls, folder: str | Path | None = None, required: bool = True, device: str | torch.device = "cpu"
    ) -> "SafetyChecker | None":
        """Read the checker from `folder`, else from models/safety-checker/, else from the Hugging Face cache.

        Where it is not on this machine: CheckpointError that says how to get it, or None if not `required`.
        """
        found = find(folder)
        if found is None:
            if not required:
                return None
            place, files = folder or FOLDER, f"config.json and {' or '.join(WEIGHTS)}"
            raise CheckpointError(
                f"no safety checker at {place}{'' if folder else ' or in the Hugging Face cache'}: "
                f"put {files} of https://huggingface.co/{PUBLISHED} in {place}, or use --safety off"
            )
        with blank():
            network = SafetyNetwork(*read_shape(found))
        network.load_state_dict(pick(read_weights(found), network.state_dict(), found), assign=True)
        return cls(network.to(device))

    @torch.inference_mode()
    def check(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """Judge pictures of any size and mode."""
        if not images:
            return []
        pixels = np.stack([prepare(image, self.network.vision_model.config.image) for image in images])
        scores = self.network(torch.from_numpy(pixels).to(self.network.concept_embeds.device))
        hits = [row.nonzero().flatten().tolist() for row in scores > 0]
        return [Verdict(bool(row), tuple(f"concept {index}" for index in row)) for row in hits]


def find(folder: str | Path | None = None) -> Path | None:
    """The folder that holds the checker's weights; None where it is not on this machine."""
    if folder is None and not any((FOLDER / name).is_file() for name in WEIGHTS):
        return local_folder(PUBLISHED, WEIGHTS)
    folder = Path(folder or FOLDER)
    return folder if any((folder / name).is_file() for name in WEIGHTS) else None


def read_shape(folder: Path) -> tuple[ClipConfig, int]:
    """The picture tower and the dimensions of the space that config.json describes."""
    path = folder / "config.json"
    found = read_json(path)
    if missing := {"vision_config", "projection_dim"} - set(found):
        raise ConfigError(f"{path} does not describe a safety checker: it has no {', '.join(sorted(missing))}")
    return tower_config(found["vision_config"], path), found["projection_dim"]


def prepare(image: Image.Image, side: int) -> np.ndarray:
    """What CLIP reads: the shorter side made `side` (bicubic), the middle square, normalised: float32 (3, s, s)."""
    image = image.convert("RGB")
    scale = side / min(image.size)
    width, height = (max(side, int(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    colours = np.asarray(square, dtype=np.float32) / 255
    return ((colours - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).transpose(2, 0, 1)


def apply(image: Image.Image, verdict: Verdict, action: str) -> Image.Image:
    """The picture as it may be shown: a flagged one blurred or black if so asked, any other as it is.

    action: off, flag (which only tells), blur or black. Raises RequestError for another.
    """
    if action not in ACTIONS:
        raise RequestError(f"the safety action must be one of {', '.join(ACTIONS)}, got {action!r}")
    if not verdict.flagged or action in ("off", "flag"):
        return image
    if action == "black":
        return Image.new(image.mode, image.size)
    return image.filter(ImageFilter.GaussianBlur(max(image.size) / 16))
