"""Pictures from a prompt, with a Stable Diffusion checkpoint in its original form.

  python scripts/txt2img.py --prompt "a photograph of an astronaut riding a horse" --plms

Writes OUTDIR/samples/00000.png and OUTDIR/grid-0000.png, going on from the highest number there, and prints each path.
Exit codes: 0 all made, 1 some failed, 2 wrong usage, 3 no model, 4 out of memory, 130 interrupted.
"""

import sys

from ldm.generation import arguments
from ldm.generation.command import draw, execute, replay, rows
from ldm.generation.options import LATENT_UPSCALER

LAION_400M = {
    "config": "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    "ckpt": "models/ldm/text2img-large/model.ckpt",
    "outdir": "outputs/txt2img-samples-laion400m",
}


def add_request(parser: arguments.Parser) -> None:
    """The options that say what one picture is: those that a row of --from-file may have."""
    arguments.add_prompts(parser, "a painting of a virus monster playing guitar")
    arguments.add_sampling(parser, sampler="plms", scale=7.5)
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
    parser.add_argument("--laion400m", action="store_true", help="take the LAION-400M model at its usual place")
    arguments.add_output(parser, "outputs/txt2img-samples", n_iter=2, batch_size=3)
    arguments.add_replay(parser)
    args = parser.parse_args(argv)
    args.upscaler = args.upscaler or (LATENT_UPSCALER if args.upscale else None)
    if args.laion400m:
        vars(args).update(LAION_400M)
    return args


def main() -> int:
    args = parse()
    if args.replay:
        return replay(args)
    return draw(args, rows(args, add_request))


if __name__ == "__main__":
    sys.exit(execute(main))
