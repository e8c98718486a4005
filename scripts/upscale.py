"""Pictures drawn anew at four times their size, with the Stable Diffusion x4 upscaler, or at twice.

  python scripts/upscale.py --init-img small.png --prompt "a white cat"
  python scripts/upscale.py --init-img small.png --scale_factor 2 --steps 20 --scale 1
  python scripts/upscale.py --init-img 00000.png --depth-img 00000_depth.png --scale_factor 2 --ckpt ldm3d-sr/

A prompt that says what is seen helps. The picture is taken as it is, of any size; a long one is drawn in overlapping
tiles, which are blended at every step. --noise_level says how much of it may be flaws, such as those of JPEG.
--scale_factor 2 takes the latent upscaler, which was made for what Stable Diffusion 1 and 2 draw. LDM3D's upscaler
enlarges a picture and its depth (--depth-img) together.
Writes OUTDIR/samples/00000.png and OUTDIR/grid-0000.png, going on from the highest number there, and prints each path.
Exit codes: 0 all made, 1 some failed, 2 wrong usage, 3 no model, 4 out of memory, 130 interrupted.
"""

import sys

from ldm.generation import arguments
from ldm.generation.command import draw, execute, replay, rows
from ldm.generation.options import LATENT_UPSCALER
from ldm.generation.request import UPSCALER_NOISE, Request

# By the factor: where the model is.
MODELS = {4: "models/ldm/stable-diffusion-x4-upscaler/model.ckpt", 2: LATENT_UPSCALER}
MADE_FOR = ["LatentUpscaleDiffusion", "LatentUpscale2xDiffusion", "LatentUpscaleDepthDiffusion"]


def add_request(parser: arguments.Parser) -> None:
    """The options that say what one picture is: those that a row of --from-file may have."""
    arguments.add_prompts(parser, "")
    group = parser.add_argument_group("what to enlarge")
    group.add_argument("--init-img", metavar="FILE", help="the small picture")
    group.add_argument("--depth-img", metavar="FILE", help="its depth, for LDM3D's upscaler")
    group.add_argument("--noise_level", type=int, default=Request.noise_level, metavar="N",
                       help="noise on the small picture of the x4 upscaler, 0 to 350: with more, more of it may be "
                       f"flaws (default: {UPSCALER_NOISE})")
    group.add_argument("--tile", type=int, default=Request.tile, metavar="PIXELS",
                       help="draw a picture with a longer side in tiles of this side, before it is enlarged; 0 draws "
                       "each as a whole (default: %(default)s)")
    arguments.add_sampling(parser, sampler="ddim", scale=9.0)


def parse(argv: list[str] | None = None):
    parser = arguments.Parser(__doc__)
    add_request(parser)
    arguments.add_rows(parser)
    parser.add_argument("--scale_factor", dest="upscale", type=int, choices=list(MODELS), default=4,
                        help="how many times larger (default: %(default)s)")
    arguments.add_model(parser, MODELS[4])
    arguments.add_output(parser, "outputs/upscale-samples", n_iter=1, batch_size=1)
    arguments.add_replay(parser)
    args = parser.parse_args(argv)
    if args.ckpt == MODELS[4]:
        args.ckpt = MODELS[args.upscale]
    arguments.require(parser, args, "init_img", "name the picture to enlarge with --init-img FILE")
    return args


def main() -> int:
    args = parse()
    if args.replay:
        return replay(args)
    return draw(args, rows(args, add_request, ["init_img"]), made_for=MADE_FOR)


if __name__ == "__main__":
    sys.exit(execute(main))
