"""Repaint the masked part of pictures: white in the mask is drawn anew, every other pixel stays as it is.

  python scripts/inpaint.py --prompt "a red bench" --init-img park.png --mask mask.png
  python scripts/inpaint.py --indir photos/ --outdir out/

With --prompt, a Stable Diffusion checkpoint: one made for inpainting, or any other by blending at each step.
With --indir, the latent-diffusion inpainting model on each pair NAME.png, NAME_mask.png; writes OUTDIR/NAME.png, and
leaves out what is there already (with --resume, what is as OUTDIR/manifest.jsonl says). Prints the path of each file.
Exit codes: 0 all made, 1 some failed, 2 wrong usage, 3 no model, 4 out of memory, 130 interrupted.
"""

import sys
from pathlib import Path

from ldm.generation import arguments
from ldm.generation.command import draw, draw_files, execute, mask_pairs, replay, rows
from ldm.generation.options import ModelOptions
from ldm.generation.request import Request

INPAINTING_BIG = "models/ldm/inpainting_big/last.ckpt"


def add_request(parser: arguments.Parser) -> None:
    """The options that say what one picture is: those that a row of --from-file may have."""
    arguments.add_prompts(parser, "")
    group = arguments.add_picture(parser, strength=1.0)
    group.add_argument("--mask", metavar="FILE", help="white is repainted; of any size")
    arguments.add_sampling(parser, sampler="ddim", scale=7.5)
    arguments.add_size(parser)
    arguments.add_measures(parser)


def parse(argv: list[str] | None = None):
    parser = arguments.Parser(__doc__)
    add_request(parser)
    arguments.add_rows(parser)
    parser.add_argument("--indir", metavar="DIR", help=f"repaint each pair in it, by default with {INPAINTING_BIG}")
    arguments.add_model(parser)
    arguments.add_refiner(parser)
    arguments.add_output(parser, "outputs/inpaint-samples", n_iter=1, batch_size=1)
    arguments.add_replay(parser)
    args = parser.parse_args(argv)
    if args.indir and args.ckpt == ModelOptions.ckpt:
        args.ckpt = INPAINTING_BIG
    if args.print_config:
        return args
    if sum(map(bool, (args.indir, args.init_img or args.from_file, args.replay))) != 1:
        parser.error("name a picture with --init-img FILE --mask FILE, or a folder of pairs with --indir DIR")
    if args.indir and Path(args.indir).resolve() == Path(args.outdir).resolve():
        parser.error("--outdir must be another folder than --indir: the pictures keep their names")
    if args.init_img and not (args.mask or args.from_file):
        parser.error("name what is repainted with --mask FILE: white is drawn anew")
    return args


def main() -> int:
    args = parse()
    if args.replay:
        return replay(args)
    if args.indir:
        return draw_files(args, {
            arguments.pick(Request, args, init_img=str(image), mask=str(mask)): image.name
            for image, mask in mask_pairs(args.indir)
        })
    return draw(args, rows(args, add_request, ["init_img", "mask"]))


if __name__ == "__main__":
    sys.exit(execute(main))
