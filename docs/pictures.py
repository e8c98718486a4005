"""Make the pictures of the README with the scripts that it describes.

    python docs/pictures.py               # with the model that ships, into docs/
    python docs/pictures.py --n 500       # with the curve of an evaluation of as many captions, if it is there already

What it does not know is handed to each script, such as --device or --ckpt.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.data import shapes
from ldm.evaluation.measures import beside

ROOT = Path(__file__).resolve().parents[1]
CELL, GAP, LABEL = 128, 6, 18  # pixels
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)


def run(script: str, *options: object) -> list[Path]:
    """Run a script and give the paths that it prints; its exit code ends this one."""
    command = [sys.executable, ROOT / "scripts" / f"{script}.py", *options]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return [Path(line) for line in done.stdout.splitlines() if line.endswith(".png")]


def lay_out(pictures: Sequence[Image.Image], columns: int, labels: Sequence[str] = ()) -> Image.Image:
    """Pictures in rows, small, each above its label if there are any."""
    across, down = CELL + GAP, CELL + GAP + (LABEL if labels else 0)
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * across - GAP, rows * down - GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for index, picture in enumerate(pictures):
        left, top = index % columns * across, index // columns * down
        canvas.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top))
        if labels:
            pen.text((left + CELL / 2, top + CELL + 2), labels[index], "black", ImageFont.load_default(12), anchor="ma")
    return canvas


def save(image: Image.Image, path: Path) -> None:
    image.save(path, optimize=True)
    print(path)


def inpainting(work: Path) -> tuple[str, Path, Path]:
    """A caption of two objects, a picture of one of them, and the mask of where the other may be."""
    caption = "a red heart left of a yellow square on a blue background"
    scene = shapes.scene_for(caption, Random(1))
    picture, mask = work / "inpaint.png", work / "inpaint_mask.png"
    shapes.draw(replace(scene, objects=scene.objects[1:])).save(picture)
    Image.fromarray(np.uint8(255 * beside(scene, 0, 256))).save(mask)
    return caption, picture, mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="captions at each scale of the curve (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("outputs/pictures"), help="(default: %(default)s)")
    parser.add_argument("--evaluation", type=Path, default=Path("outputs/evaluation"), metavar="DIR",
                        help="where scripts/evaluate.py has drawn, or is to draw, the curve (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where the pictures go (default: docs)")
    args, others = parser.parse_known_args()
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    once = ("--n_iter", 1, "--skip_grid", "--outdir", args.work, *others)

    drawn = run("txt2img", "--from-file", ROOT / "docs" / "captions.txt", "--n_samples", 4, *once)
    save(lay_out([Image.open(path) for path in drawn], 4), args.out / "txt2img.png")

    rows = args.work / "strengths.txt"
    rows.write_text("".join(f"a large yellow star on a purple background --strength {x}\n" for x in STRENGTHS))
    changed = run("img2img", "--from-file", rows, "--init-img", drawn[0], "--n_samples", 1, *once)
    save(lay_out([Image.open(path) for path in (drawn[0], *changed)], 6, ["input", *map(str, STRENGTHS)]),
         args.out / "img2img.png")

    caption, picture, mask = inpainting(args.work)
    painted = run("inpaint", "--prompt", caption, "--init-img", picture, "--mask", mask, "--n_samples", 1, *once)
    before, (after,) = Image.open(picture), map(Image.open, painted)
    hidden = Image.composite(Image.new("RGB", before.size, "lightgray"), before, Image.open(mask))
    save(lay_out([before, hidden, after], 3, ["input", "what is repainted", "output"]), args.out / "inpaint.png")

    (curve,) = run("evaluate", "--n", args.n, "--outdir", args.evaluation, *others)
    save(Image.open(curve).convert("RGB"), args.out / "curve.png")


if __name__ == "__main__":
    main()
