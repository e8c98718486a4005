"""The sizes that a model works in, read from its config before any weight is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import ConfigError, RequestError
from ldm.generation.request import Request, check_side

# What params leave out, by what they call the network: those of CompVis, and those of Stability AI's `sgm`.
SILENT = {"unet_config": {"channels": 3, "image_size": 32}, "network_config": {"channels": 4, "image_size": 128}}


@dataclass(frozen=True)
class Geometry:
    """Channels and factor of the latents; the native side in pixels; the step that a side must be a multiple of.

    enlarges: how many times the side of what is drawn is that of the picture it is drawn from, in models made for that.
    image_channels: of what is decoded: 3 colours, and where the model draws depth too, 1 or 3 more for that.
    """

    channels: int
    factor: int
    side: int
    step: int
    image_channels: int = 3
    enlarges: int = 1

    def size(self, request: Request) -> tuple[int, int]:
        """Width and height in pixels. Raises RequestError for a side that cannot be halved evenly."""
        width, height = request.width or self.side, request.height or self.side
        check_side("W", width, self.step)
        check_side("H", height, self.step)
        return width, height

    def latent(self, width: int, height: int) -> tuple[int, int, int]:
        """The latent's shape (c, h, w) for a picture in pixels."""
        return self.channels, height // self.factor, width // self.factor

    def check_upscale(self, request: Request, beside: bool = False) -> None:
        """Raise RequestError where a picture is to be enlarged otherwise than the model does it.

        beside: the model enlarges what another one has drawn, where that is asked for.
        """
        if beside and request.upscale and request.mask:
            raise RequestError("what is repainted in a picture cannot be enlarged with it: leave --upscale out")
        if request.upscale == self.enlarges or (request.upscale is None and (beside or self.enlarges == 1)):
            return
        if self.enlarges == 1:
            raise RequestError("this model does not enlarge pictures: name an upscaler, with --upscaler in txt2img.py "
                               "and img2img.py, with --ckpt in upscale.py")
        if beside:
            raise RequestError(f"this upscaler enlarges pictures {self.enlarges} times: take --upscale {self.enlarges}")
        raise RequestError(f"this model enlarges pictures {self.enlarges} times: use scripts/upscale.py with "
                           f"--init-img and --scale_factor {self.enlarges}")

    def tile(self, side: int) -> tuple[int, int]:
        """A tile's side in latents, from that in pixels of the small picture, and the step that it is a multiple of."""
        step = self.step // self.factor
        return max(1, round(side * self.enlarges / self.factor / step)) * step, step

    def check(self, channels: int | None, factor: int | None) -> None:
        """Hold what the command line says of the latents (--C, --f) against the config."""
        for name, said, is_ in (("C", channels, self.channels), ("f", factor, self.factor)):
            if said is not None and said != is_:
                raise RequestError(f"{name} is {is_} in this model, got {said}; leave the option out")


def geometry(model_section: Mapping, source: str | Path = "the config") -> Geometry:
    """Read the `model:` section of a config. Raises ConfigError where it does not describe a latent diffusion model."""
    try:
        params = model_section["params"]
        first_stage = params["first_stage_config"]["params"]
        factor = 2 ** (len(first_stage["ddconfig"]["ch_mult"]) - 1) if "ddconfig" in first_stage else 1
        network = next((name for name in SILENT if name in params), "unet_config")
        levels = len(params[network]["params"].get("channel_mult", (1, 2, 4, 8)))
        said = {name: params.get(name, value) for name, value in SILENT[network].items()}
        sides = said["image_size"]
        side = sides if isinstance(sides, int) else max(sides)
        decoded = first_stage.get("ddconfig", {}).get("out_ch", 3)
        # Where the small picture stands beside the latents, it is of their size.
        enlarges = factor if "low_scale_config" in params else params.get("enlarges", 1)
        return Geometry(
            said["channels"], factor, side * factor, factor * 2 ** (levels - 1), decoded, enlarges)
    except (KeyError, TypeError, AttributeError) as error:
        what = str(error).partition("\n")[0]
        raise ConfigError(f"{source} does not describe a latent diffusion model ({what})") from error
