"""Edit pictures as a prompt says, with an InstructPix2Pix checkpoint.

  python scripts/edit.py --init-img park.png --prompt "make it winter" --ckpt instruct-pix2pix-00-22000.safetensors

More --text_scale follows the prompt more closely, more --image_scale the picture. The picture is turned upright, its
transparent parts become white, and it is resized to multiples of 64.
Writes OUTDIR/samples/00000.png and OUTDIR/grid-0000.png, going on from the highest number there, and prints each path.
Exit codes: 0 all made, 1 some failed, 2 wrong usage, 3 no model, 4 out of memory, 130 interrupted.
"""

import sys

from ldm.generation import arguments
from ldm.generation.command import draw, execute, replay, rows

STEPS = 100  # of the original, as are the sampler and the scale of the text


def add_request(parser: arguments.Parser) -> None:
    """The options that say what one picture is: those that a row of --from-file may have."""
    arguments.add_prompts(parser, "")
    group = arguments.add_picture(parser, strength=1.0)
    group.add_argument("--image_scale", type=float, default=1.5, metavar="X",
                       help="guidance by the picture: 1 is none, more follows it more closely (default: %(default)s)")
    arguments.add_sampling(parser, sampler="euler_a", scale=7.5, guidance=("--scale", "--text_scale"))
    arguments.add_size(parser)
    parser.set_defaults(steps=STEPS)


def parse(argv: list[str] | None = None):
    parser = arguments.Parser(__doc__)
    add_request(parser)
    arguments.add_rows(parser)
    arguments.add_latents(parser)
    arguments.add_model(parser, "models/ldm/instruct-pix2pix/model.ckpt")
    arguments.add_output(parser, "outputs/edit-samples", n_iter=1, batch_size=1)
    arguments.add_replay(parser)
    args = parser.parse_args(argv)
    arguments.require(parser, args, "init_img", "name the picture to edit with --init-img FILE")
    arguments.require(parser, args, "prompt", "say what is to change with --prompt TEXT")
    return args


def main() -> int:
    args = parse()
    if args.replay:
        return replay(args)
    return draw(args, rows(args, add_request, ["init_img"]))


if __name__ == "__main__":
    sys.exit(execute(main))
