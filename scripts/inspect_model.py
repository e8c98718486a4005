"""Tell what a checkpoint is: its family, types, parameters, hash, and what is odd about it.

  python scripts/inspect_model.py model.ckpt other.safetensors folder/

Nothing in a file is executed; without the hash and --check, its numbers are not read.
Exit codes: 0 told, 1 --check found something that is broken, 2 wrong usage, 3 a checkpoint that cannot be read.
"""

import json
import logging
import sys
from dataclasses import asdict

from ldm.errors import LdmError, ModelError
from ldm.generation.arguments import Parser
from ldm.generation.command import execute
from ldm.generation.options import find

logger = logging.getLogger(__name__)


def parse(argv: list[str] | None = None):
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="a .ckpt or .safetensors file, or a folder")
    parser.add_argument("--no-hash", action="store_true", help="without the SHA-256, for which all of it is read")
    parser.add_argument("--check", action="store_true",
                        help="also read every number, and hold them against their checksums and the config's model")
    parser.add_argument("--config", metavar="YAML",
                        help="for --check (default: the one beside CKPT, else the shipped one of what CKPT is)")
    parser.add_argument("--json", action="store_true", help="one JSON object a checkpoint, a line each")
    return parser.parse_args(argv)


def tell(path: str, args):
    """The report on one checkpoint."""
    from ldm.checkpoint import open_checkpoint
    from ldm.checkpoint.report import altered, inspect, spoiled

    checkpoint = open_checkpoint(find(path))
    report = inspect(checkpoint)
    if not args.no_hash:
        report.sha256 = checkpoint.sha256
    if args.check:
        report.broken = [*altered(checkpoint.path), *spoiled(checkpoint), *misfits(checkpoint, args.config)]
    return report


def misfits(checkpoint, config: str | None) -> list[str]:
    """What the loader has to say against the weights, under this config or the one that belongs to them."""
    from ldm.generation.loading import shipped_config
    from ldm.models.load import build_model, match

    try:
        config = find(config or shipped_config(checkpoint.path))
        match(build_model(config), checkpoint.outline, checkpoint, str(config))
    except ModelError as error:
        return [str(error)]
    return []


def main() -> int:
    args = parse()

    from ldm.checkpoint.report import lines

    code = 0
    for path in args.checkpoints:
        try:
            report = tell(path, args)
        except LdmError as error:
            logger.error("%s", error)
            code = max(code, error.exit_code)
            continue
        print(json.dumps(asdict(report)) if args.json else "\n".join(lines(report)))
        code = max(code, int(bool(report.broken)))
    return code


if __name__ == "__main__":
    sys.exit(execute(main))
