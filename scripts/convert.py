"""Write a checkpoint in another form: .ckpt, .safetensors, or a folder in the layout of diffusers.

  python scripts/convert.py model.ckpt model.safetensors --half
  python scripts/convert.py model.ckpt model/ --config configs/stable-diffusion/v1-inference.yaml
  python scripts/convert.py model/ model.ckpt

Prints the path. The form is that of the target's ending; without one it is a folder. No weight is lost on the way: what
has no place in a folder goes into its ldm_rest.safetensors. Only a folder that another program wrote holds less; what
the model does not use is then written as zeros, and this is said. What training left beside the weights is not kept.
Exit codes: 0 written, 1 it could not be written, 2 wrong usage, 3 the checkpoint cannot be read.
"""

import sys
from pathlib import Path

from ldm.generation.arguments import Parser
from ldm.generation.command import execute
from ldm.generation.options import find


def parse(argv: list[str] | None = None):
    parser = Parser(__doc__)
    parser.add_argument("source", metavar="SRC", help="a .ckpt or .safetensors file, or a folder")
    parser.add_argument("target", metavar="DST", help="a .ckpt or .safetensors file, or a folder")
    types = parser.add_mutually_exclusive_group()
    types.add_argument("--half", dest="dtype", action="store_const", const="float16", help="as float16")
    types.add_argument("--bf16", dest="dtype", action="store_const", const="bfloat16", help="as bfloat16")
    types.add_argument("--full", dest="dtype", action="store_const", const="float32",
                       help="as float32 (default: each weight as it is; the schedule always stays as it is)")
    averaged = parser.add_mutually_exclusive_group()
    averaged.add_argument("--ema", action="store_true", default=None, help="only the averaged weights, as the weights")
    averaged.add_argument("--no-ema", dest="ema", action="store_false", help="without the averaged weights")
    parser.add_argument("--config", metavar="YAML", help="of the model, for a folder (default: the one beside SRC, "
                        "else the shipped one of what SRC tells that it is)")
    parser.add_argument("--force", action="store_true", help="replace what is at DST")
    return parser.parse_args(argv)


def main() -> int:
    args = parse()

    import torch

    from ldm.generation.loading import shipped_config
    from ldm.models.convert import convert, is_file

    source = find(args.source)
    config = None if is_file(args.target) else find(args.config or shipped_config(source))
    dtype = args.dtype and getattr(torch, args.dtype)
    convert(source, args.target, dtype=dtype, ema=args.ema, config=config, force=args.force)
    print(Path(args.target))
    return 0


if __name__ == "__main__":
    sys.exit(execute(main))
