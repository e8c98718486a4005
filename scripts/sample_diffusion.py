"""Pictures from an unconditional or class-conditional latent diffusion model.

  python scripts/sample_diffusion.py -r models/ldm/lsun_churches256/model.ckpt -n 8
  python scripts/sample_diffusion.py -r models/ldm/cin256-v2/model.ckpt -n 4 --classes 207,360 --scale 3 -e 0

The config is the config.yaml beside the checkpoint. Writes LOGDIR/samples/00000.png and LOGDIR/grid-0000.png, going on
from the highest number there, and prints each path.
Exit codes: 0 all made, 1 some failed, 2 wrong usage, 3 no model, 4 out of memory, 130 interrupted.
"""

import sys
from argparse import ArgumentTypeError
from pathlib import Path

from ldm.generation import arguments
from ldm.generation.command import draw, execute, replay
from ldm.generation.request import MAX_STEPS, Request
from ldm.generation.rows import Row

CHECKPOINTS = ("model.ckpt", "last.ckpt", "checkpoints/last.ckpt", "model.safetensors")


def parse(argv: list[str] | None = None):
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("what to draw")
    group.add_argument("-r", "--resume", metavar="PATH", help="the checkpoint, or the folder that it lies in")
    group.add_argument("-n", "--n_samples", dest="count", type=int, default=8, metavar="N",
                       help="pictures; of each class where there are classes (default: %(default)s)")
    group.add_argument("--classes", type=labels, default=[None], metavar="N,N", help="the classes to draw")
    group.add_argument("-v", "--vanilla_sample", action="store_true", help="the ancestral chain over all its steps")
    arguments.add_sampling(parser, sampler="ddim", scale=1.0, steps=("-c", "--custom_steps", "--ddim_steps"),
                           eta=("-e", "--eta", "--ddim_eta"))
    parser.set_defaults(eta=None)
    arguments.add_model(parser, ckpt=None)
    arguments.add_output(parser, "outputs/diffusion-samples", n_iter=1, batch_size=10, batch_option="--batch_size",
                         outdir_option=("-l", "--logdir", "--outdir"), verbose=("--verbose",))
    arguments.add_replay(parser)
    args = parser.parse_args(argv)
    if not (args.resume or args.print_config):
        parser.error("name the checkpoint, or the folder that it lies in, with -r PATH")
    if args.count < 1:
        parser.error(f"n_samples must be at least 1, got {args.count}")
    if args.vanilla_sample:
        args.sampler, args.steps = "ddpm", MAX_STEPS
    if args.eta is None:
        args.eta = 1.0 if args.sampler == "ddim" else 0.0
    args.ckpt = checkpoint(Path(args.resume or ""))
    return args


def labels(text: str) -> list[int]:
    try:
        return [int(one) for one in text.split(",")]
    except ValueError as error:
        raise ArgumentTypeError(f"must be numbers with commas between them, such as 207,360, got {text!r}") from error


def checkpoint(path: Path) -> str:
    """The checkpoint in a folder, by its usual names; a path that is no folder is taken as it is."""
    inside = (path / name for name in CHECKPOINTS)
    return str(next((file for file in inside if file.exists()), path))


def main() -> int:
    args = parse()
    if args.replay:
        return replay(args)
    wanted = [label for label in args.classes for _ in range(args.count)]
    return draw(args, [Row(arguments.pick(Request, args, class_label=label)) for label in wanted])


if __name__ == "__main__":
    sys.exit(execute(main))
