"""Pictures that a text file lists, as LSUN is laid out: a file name a line, and a folder that the names start from."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.errors import RequestError
from ldm.image.io import read_image, to_array

RESAMPLING = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class LSUNBase(Dataset):
    """{image: float32 (size, size, 3) in [-1, 1], and its paths}: the middle square, mirrored with probability flip_p.

    Without a size the square keeps its own. Raises RequestError where the list is missing or empty.
    """

    def __init__(self, txt_file: str, data_root: str, size: int | None = None, interpolation: str = "bicubic",
                 flip_p: float = 0.5):
        if interpolation not in RESAMPLING:
            raise RequestError(f"interpolation must be one of {', '.join(RESAMPLING)}, got {interpolation!r}")
        self.size, self.flip_p = size, flip_p
        self.resampling = RESAMPLING[interpolation]
        self.root = Path(data_root)
        self.names = read_list(txt_file)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        name = self.names[index]
        image = read_image(self.root / name)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if self.size is not None:
            image = image.resize((self.size, self.size), self.resampling)
        pixels = to_array(image)
        if Random(f"{torch.initial_seed()}/{index}").random() < self.flip_p:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        return {"image": pixels, "relative_file_path_": name, "file_path_": str(self.root / name)}


def read_list(path: str) -> Sequence[str]:
    """The lines of a file that are not blank."""
    if not Path(path).is_file():
        raise RequestError(f"there is no list of pictures at {path}: it must name one file a line")
    names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise RequestError(f"the list of pictures at {path} is empty")
    return names


class LSUNChurchesTrain(LSUNBase):
    def __init__(self, **options):
        super().__init__("data/lsun/church_outdoor_train.txt", "data/lsun/churches", **options)


class LSUNChurchesValidation(LSUNBase):
    def __init__(self, flip_p: float = 0.0, **options):
        super().__init__("data/lsun/church_outdoor_val.txt", "data/lsun/churches", flip_p=flip_p, **options)


class LSUNBedroomsTrain(LSUNBase):
    def __init__(self, **options):
        super().__init__("data/lsun/bedrooms_train.txt", "data/lsun/bedrooms", **options)


class LSUNBedroomsValidation(LSUNBase):
    def __init__(self, flip_p: float = 0.0, **options):
        super().__init__("data/lsun/bedrooms_val.txt", "data/lsun/bedrooms", flip_p=flip_p, **options)


class LSUNCatsTrain(LSUNBase):
    def __init__(self, **options):
        super().__init__("data/lsun/cat_train.txt", "data/lsun/cats", **options)


class LSUNCatsValidation(LSUNBase):
    def __init__(self, flip_p: float = 0.0, **options):
        super().__init__("data/lsun/cat_val.txt", "data/lsun/cats", flip_p=flip_p, **options)
