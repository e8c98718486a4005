"""What is done to a drawn picture before it is written: the safety checker and the invisible watermark."""

import logging
from dataclasses import dataclass

from PIL import Image

from ldm.generation.options import WATERMARKS, RunOptions
from ldm.generation.pipeline import Picture
from ldm.generation.request import Request
from ldm.image.watermark import load_package, stamp
from ldm.safety import SafetyChecker, apply

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A picture as it is written, and what was done to it.

    watermark: the method that it can be read back with, or None. safety: what the checker found, "" where none looked.
    depth: its depth map, where the model draws one; that of a picture which may not be seen is left out.
    """

    image: Image.Image
    request: Request
    watermark: str | None
    safety: str
    cut: str
    depth: Image.Image | None = None


class Finisher:
    """Checks and marks pictures as the options say."""

    def __init__(self, options: RunOptions):
        self.text = WATERMARKS[0] if options.watermark is None else options.watermark
        if self.text:
            load_package()  # what is missing is told now, not after the first picture
        self._noted: set[str] = set()
        self.action = options.safety
        self.checker = None if self.action == "off" else SafetyChecker.load(required=self.action != "auto")
        if self.action == "auto":
            self.action = "flag"

    def __call__(self, picture: Picture) -> Finished:
        image, found = self.check(picture.image)
        marked, method = self.mark(image)
        depth = picture.depth if image is picture.image else None
        return Finished(marked, picture.request, method, found, picture.cut, depth)

    def check(self, image: Image.Image) -> tuple[Image.Image, str]:
        """The picture after the safety action, and what the checker says of it."""
        if self.checker is None:
            if self.action != "off":
                self.note(logging.INFO, "no safety checker: its weights are not at hand")
            return image, ""
        verdict = self.checker.check([image])[0]
        if verdict.flagged:
            logger.warning("the safety checker flags a picture (%s): %s", ", ".join(verdict.concepts), self.action)
        return apply(image, verdict, self.action), f"flagged, {self.action}" if verdict.flagged else "passed"

    def mark(self, image: Image.Image) -> tuple[Image.Image, str | None]:
        """The picture with its watermark and the method that reads it back, or the picture as it was and None."""
        if not self.text:
            return image, None
        stamped = stamp(image, self.text)
        if stamped.note:
            self.note(logging.WARNING, stamped.note)
        return stamped.image, stamped.method

    def note(self, level: int, text: str) -> None:
        """Log what may be true of many pictures once."""
        if text not in self._noted:
            self._noted.add(text)
            logger.log(level, "%s", text)
