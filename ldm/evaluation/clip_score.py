"""How well a picture fits its caption: the cosine of the vectors that CLIP gives both (Hessel et al. 2021)."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoint import checkpoint_hash
from ldm.errors import ConfigError
from ldm.modules.encoders.clip import (
    CLIP_MEAN,
    CLIP_STD,
    ClipConfig,
    ClipTextTransformer,
    ClipVisionTransformer,
    tower_config,
)
from ldm.modules.encoders.files import WEIGHTS, pick, read_json, read_weights, weights_of
from ldm.modules.encoders.tokenizer import TextTokenizer, clip_tokenizer, tokenizer_folder

BATCH = 32
TOWERS = ("text_config", "vision_config")


class Towers(nn.Module):
    """Both towers of CLIP with their projections into the common space, under the names that transformers uses."""

    def __init__(self, text: ClipConfig, vision: ClipConfig, embed: int):
        super().__init__()
        self.text_model = ClipTextTransformer(text).text_model
        self.vision_model = ClipVisionTransformer(vision).vision_model
        self.text_projection = nn.Linear(text.width, embed, bias=False)
        self.visual_projection = nn.Linear(vision.width, embed, bias=False)


class Clip:
    """A CLIP that scores; called with pictures it gives their vectors (b, d), as the features of a Fréchet distance."""

    name = "clip"

    def __init__(self, towers: Towers, tokenizer: TextTokenizer, side: int, length: int, identity: str):
        self.towers = towers.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.side, self.length = side, length
        self.identity = identity

    @classmethod
    def load(cls, folder: str | Path, device: torch.device) -> "Clip":
        """Read a folder in the transformers form of CLIPModel: config.json, weights, tokenizer.

        Raises ConfigError where it is none, CheckpointError where the weights do not fit.
        """
        folder = Path(folder)
        if not has_both_towers(folder):
            raise ConfigError(f"{folder} is no CLIP with both towers: config.json with {' and '.join(TOWERS)}, and "
                              f"one of {', '.join(WEIGHTS)} are needed")
        described = read_json(folder / "config.json")
        text, vision = (tower_config(described[name], folder / "config.json") for name in TOWERS)
        towers = Towers(text, vision, described.get("projection_dim", 512))
        towers.load_state_dict(pick(read_weights(folder), towers.state_dict(), folder))
        tokenizer = clip_tokenizer(tokenizer_folder(folder), max_length=text.length)
        sha256 = checkpoint_hash(weights_of(folder))
        return cls(towers.to(device), tokenizer, vision.image, text.length, f"CLIP, sha256 {sha256[:10]}")

    @property
    def resize(self) -> str:
        return f"shorter side to {self.side}, bicubic and antialiased with Pillow, centre crop"

    @property
    def device(self) -> torch.device:
        return self.towers.text_projection.weight.device

    @torch.inference_mode()
    def read(self, texts: Sequence[str]) -> Tensor:
        """The vectors (b, d) of texts, cut where they are longer than the tower reads."""
        ids = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.length,
                             return_tensors="pt")["input_ids"]
        return self.towers.text_projection(self.towers.text_model(ids.to(self.device)).pooler_output)

    @torch.inference_mode()
    def see(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The vectors (b, d) of pictures."""
        pixels = torch.from_numpy(np.stack([self.prepare(picture) for picture in pictures])).to(self.device)
        return self.towers.visual_projection(self.towers.vision_model(pixels).pooler_output)

    def prepare(self, picture: Image.Image) -> np.ndarray:
        """The pixels that the picture tower is shown, normalised: float32 (3, side, side)."""
        scale = self.side / min(picture.size)
        size = [max(self.side, round(scale * length)) for length in picture.size]
        left, top = ((length - self.side) // 2 for length in size)
        small = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(small.crop((left, top, left + self.side, top + self.side)), np.float32) / 255
        return ((pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).transpose(2, 0, 1)

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        return self.see(pictures).cpu().numpy()

    def score(self, pictures: Iterable[Image.Image], captions: Iterable[str]) -> np.ndarray:
        """The cosine of each picture and its caption, in [-1, 1]: (n,)."""
        pairs = zip(pictures, captions, strict=True)
        batches = (zip(*batch) for batch in iter(lambda: list(islice(pairs, BATCH)), []))
        return torch.cat([F.cosine_similarity(self.see(seen), self.read(said)) for seen, said in batches]).cpu().numpy()


def has_both_towers(folder: Path) -> bool:
    """Whether a folder holds a whole CLIP in the transformers form."""
    if not (folder / "config.json").is_file() or weights_of(folder) is None:
        return False
    return set(TOWERS) <= read_json(folder / "config.json").keys()
