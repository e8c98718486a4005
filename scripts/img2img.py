"""Pictures from a picture and a prompt, with a Stable Diffusion checkpoint in its original form.

  python scripts/img2img.py --prompt "A fantasy landscape" --init-img sketch.jpg --strength 0.8

The picture is turned upright, its transparent parts become white, and it is resized to multiples of 64.
Writes OUTDIR/samples/00000.png and OUTDIR/grid-0000.png, going on from the highest number there, and prints each path.
Exit codes: 0 all made, 1 some failed, 2 wrong usage, 3 no model, 4 out of memory, 130 interrupted.
"""

import sys

from ldm.generation import arguments
from ldm.generation.command import draw, execute, replay, rows
from ldm.generation.options import LATENT_UPSCALER


def add_request(parser: arguments.Parser) -> None:
    """The options that say what one picture is: those that a row of --from-file may have."""
    arguments.add_prompts(parser, "a painting of a virus monster playing guitar")
    arguments.add_picture(parser, strength=0.75)
    arguments.add_sampling(parser, sampler="ddim", scale=5.0)
    arguments.add_size(parser)
    arguments.add_measures(parser)


def parse(argv: list[str] | None = None):
    parser = arguments.Parser(__doc__)
    add_request(parser)
    arguments.add_rows(parser)
    arguments.add_latents(parser)
    arguments.add_model(parser)
    arguments.add_refiner(parser)
    arguments.add_upscaler(parser)
    arguments.add_output(parser, "outputs/img2img-samples", n_iter=1, batch_size=2)
    arguments.add_replay(parser)
    args = parser.parse_args(argv)
    args.upscaler = args.upscaler or (LATENT_UPSCALER if args.upscale else None)
    arguments.require(parser, args, "init_img", "name the picture to start from with --init-img FILE")
    return args


def main() -> int:
    args = parse()
    if args.replay:
        return replay(args)
    return draw(args, rows(args, add_request, ["init_img"]))


if __name__ == "__main__":
    sys.exit(execute(main))
