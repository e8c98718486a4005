"""Variations of a picture, with a checkpoint of image variations or of Stable unCLIP.

  python scripts/variation.py --init-img dog.jpg
  python scripts/variation.py --init-img dog.jpg --prompt "as an oil painting" --scale 10 --ckpt sd21-unclip-h.ckpt

The model is told what CLIP sees in the picture, which may be of any size, and draws at its own. Image variations take
no prompt; Stable unCLIP can do with one, and more --noise_level goes further away from the picture.
Writes OUTDIR/samples/00000.png and OUTDIR/grid-0000.png, going on from the highest number there, and prints each path.
Exit codes: 0 all made, 1 some failed, 2 wrong usage, 3 no model, 4 out of memory, 130 interrupted.
"""

import sys

from ldm.generation import arguments
from ldm.generation.command import draw, execute, replay, rows


def add_request(parser: arguments.Parser) -> None:
    """The options that say what one picture is: those that a row of --from-file may have."""
    arguments.add_prompts(parser, "")
    group = arguments.add_picture(parser, strength=None)
    group.add_argument("--noise_level", type=int, metavar="N",
                       help="noise added to what is seen in the picture, 0 to 999, with Stable unCLIP (default: 0)")
    arguments.add_sampling(parser, sampler="ddim", scale=3.0)
    arguments.add_size(parser)
    parser.set_defaults(varies=True)


def parse(argv: list[str] | None = None):
    parser = arguments.Parser(__doc__)
    add_request(parser)
    arguments.add_rows(parser)
    arguments.add_latents(parser)
    arguments.add_model(parser, "models/ldm/sd-image-variations/model.ckpt")
    arguments.add_output(parser, "outputs/variation-samples", n_iter=1, batch_size=3)
    arguments.add_replay(parser)
    args = parser.parse_args(argv)
    arguments.require(parser, args, "init_img", "name the picture to vary with --init-img FILE")
    return args


def main() -> int:
    args = parse()
    if args.replay:
        return replay(args)
    return draw(args, rows(args, add_request, ["init_img"]))


if __name__ == "__main__":
    sys.exit(execute(main))
