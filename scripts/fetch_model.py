"""Fetch published weights from the Hugging Face hub to where the scripts look for them.

  python scripts/fetch_model.py v1.5
  python scripts/fetch_model.py --list

What broke off is resumed, every file is checked by its SHA-256, and the path is printed. HF_ENDPOINT names another
server, HF_TOKEN or `hf auth login` says who you are. Exit codes: 0 it is there, 1 it could not be written, 2 wrong
usage, 3 it cannot be had.
"""

import logging
import sys
from pathlib import Path

from ldm.download import MODELS, fetch
from ldm.generation.arguments import Parser
from ldm.generation.command import execute
from ldm.generation.options import REPOSITORY


def parse(argv: list[str] | None = None):
    here = Path() if Path("models").is_dir() or not (REPOSITORY / "models").is_dir() else REPOSITORY
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--list", action="store_true", help="tell what can be fetched, from where and to where")
    parser.add_argument("--root", default=str(here), metavar="DIR",
                        help="the folder above models/ (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace another file that is in the way")
    args = parser.parse_args(argv)
    if not args.names and not args.list:
        parser.error("give the NAME of a model, or --list")
    return args


def main() -> int:
    args = parse()
    logging.getLogger().setLevel(logging.WARNING)  # the library of the hub tells of each request
    logging.getLogger("ldm").setLevel(logging.INFO)
    if args.list:
        for name, model in MODELS.items():
            place = Path(model.folder) / model.link
            there = all((Path(args.root) / model.folder / file).exists() for file in model.files)
            print(name, model.what, f"huggingface.co/{model.repos[0]}", place, "there" if there else "-", sep="\t")
    for name in args.names:
        print(fetch(name, args.root, args.force))
    return 0


if __name__ == "__main__":
    sys.exit(execute(main))
