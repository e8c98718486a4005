"""Pictures from a prompt that keep the depth of a picture, with a Stable Diffusion 2 depth-to-image checkpoint.

  python scripts/depth2img.py --prompt "two tigers" --init-img cats.jpg --strength 0.7
  python scripts/depth2img.py --prompt "a crystal cave" --init-img street.png --depth-img depth.png --strength 1

The model sees the depth of the picture by itself, or takes it from a map: grey, brighter where it is nearer.
Writes OUTDIR/samples/00000.png and OUTDIR/grid-0000.png, going on from the highest number there, and prints each path.
Exit codes: 0 all made, 1 some failed, 2 wrong usage, 3 no model, 4 out of memory, 130 interrupted.
"""

import sys

from ldm.generation import arguments
from ldm.generation.command import draw, execute, replay, rows

CKPT = "models/ldm/stable-diffusion-v2-depth/model.ckpt"


def add_request(parser: arguments.Parser) -> None:
    """The options that say what one picture is: those that a row of --from-file may have."""
    arguments.add_prompts(parser, "a painting of a virus monster playing guitar")
    group = arguments.add_picture(parser, strength=0.9)
    group.add_argument("--depth-img", metavar="FILE",
                       help="a map of its depth, brighter where it is nearer, in place of what the model sees")
    arguments.add_sampling(parser, sampler="ddim", scale=9.0)
    arguments.add_size(parser)


def parse(argv: list[str] | None = None):
    parser = arguments.Parser(__doc__)
    add_request(parser)
    arguments.add_rows(parser)
    arguments.add_latents(parser)
    arguments.add_model(parser, CKPT)
    arguments.add_output(parser, "outputs/depth2img-samples", n_iter=1, batch_size=1)
    arguments.add_replay(parser)
    args = parser.parse_args(argv)
    arguments.require(parser, args, "init_img", "name the picture whose depth is kept with --init-img FILE")
    return args


def main() -> int:
    args = parse()
    if args.replay:
        return replay(args)
    return draw(args, rows(args, add_request, ["init_img"]), made_for=["LatentDepth2ImageDiffusion"])


if __name__ == "__main__":
    sys.exit(execute(main))
