"""What is written into each PNG, and read back to make the same picture again."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread
from typing import Any

from PIL.PngImagePlugin import PngInfo

from ldm import __version__
from ldm.checkpoint import checkpoint_hash
from ldm.errors import ImageError, RequestError
from ldm.generation.finish import Finished
from ldm.generation.request import Request
from ldm.image.metadata import format_parameters, read_record, sampler_label, to_pnginfo

# Packages whose version may change a picture.
PACKAGES = ("torch", "numpy", "transformers", "pillow", "invisible-watermark")

# The settings of a run that may change a picture.
HOW = ("device", "precision", "memory", "compile", "use_ema", "watermark", "safety")
ADAPTERS = ("lora", "embedding", "refiner", "upscaler")


class Recorder:
    """Describes the pictures of one run; the checkpoint is hashed in the background after the first step (`hash`).

    how: the settings of the run that change a picture, by the names in HOW and ADAPTERS.
    """

    def __init__(self, config: Path, checkpoint: Path, how: Mapping[str, Any]):
        self.config = config
        self.checkpoint = checkpoint
        self.how = dict(how)
        self.versions = installed_versions()
        self._sha256 = ""
        self._hashing: Thread | None = None

    def hash(self) -> None:
        """Begin to hash the checkpoint in the background, unless that has begun."""
        if not self._hashing:
            self._hashing = Thread(target=self._hash, daemon=True)
            self._hashing.start()

    def _hash(self) -> None:
        self._sha256 = checkpoint_hash(self.checkpoint)

    @property
    def sha256(self) -> str:
        self.hash()
        self._hashing.join()
        return self._sha256

    def png_info(
        self,
        made: Finished,
        batch: Sequence[Request],
        index: int,
        noise: list[list[int]],
        how: Mapping[str, Any] | None = None,
    ) -> PngInfo:
        """The text chunks of a picture. noise: the `Noise.history` before its batch; how: what differs from the run."""
        request, (width, height) = batch[index], made.image.size
        settings = {
            "Steps": request.steps,
            "Sampler": sampler_label(request.sampler, request.schedule),
            "CFG scale": request.scale,
            "Image CFG scale": request.image_scale,
            "Guidance interval": request.guidance_interval,
            "Token merging ratio": request.token_merging or None,
            "Safe": request.safe,
            "Seed": request.seed,
            "Size": f"{width}x{height}",
            "Model hash": self.sha256[:10],
            "Model": self.checkpoint.stem,
            "Denoising strength": request.strength if request.init_img else None,
            "Eta": request.eta or None,
            "Version": f"ldm {__version__}",
        }
        record = {
            "request": asdict(request),
            "batch": {
                "index": index,
                "noise": noise,
                "requests": [{name: getattr(one, name) for name in OF_A_PICTURE} for one in batch],
            },
            "run": self.how | dict(how or {}),
            "model": {"config": self.config.name, "checkpoint": self.checkpoint.name, "sha256": self.sha256},
            "made": {"watermark": made.watermark, "safety": made.safety, "cut": made.cut},
            "versions": self.versions,
        }
        return to_pnginfo(format_parameters(request.prompt, request.negative_prompt, settings), record)


# What the requests of one batch may differ in.
OF_A_PICTURE = ("prompt", "negative_prompt", "seed", "class_label")


def installed_versions() -> dict[str, str]:
    """Of this project and of PACKAGES, as far as they are installed."""
    found = {"ldm": __version__}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@dataclass(frozen=True)
class Replay:
    """A recorded picture: its whole batch, its place in it, the noise drawn before, and how it was run."""

    requests: tuple[Request, ...]
    index: int
    noise: list[list[int]]
    how: dict[str, Any]
    checkpoint: str
    sha256: str

    @classmethod
    def read(cls, path: str | Path) -> "Replay":
        """Read the record of a picture. Raises ImageError where it has none that can be used, RequestError."""
        record = read_record(path)
        try:
            batch, model = record["batch"], record["model"]
            requests = tuple(Request.from_record({**record["request"], **one}) for one in batch["requests"])
            noise = [[int(number) for number in numbers] for numbers in batch["noise"]]
            how = {name: record["run"][name] for name in HOW}
            how |= {name: record["run"].get(name, []) for name in ADAPTERS}
            index = range(len(requests)).index(batch["index"])
            return cls(requests, index, noise, how, str(model["checkpoint"]), str(model["sha256"]))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, RequestError):
                raise
            raise ImageError(f"the record in {path} is not complete: {error!r}") from error
