"""Train, and test, the model that YAML configs describe: python main.py -b config.yaml -t.

    python main.py -b configs/latent-diffusion/cin-ldm-vq-f8.yaml -t --gpus 0,      # as it was always called
    python main.py -b base.yaml more.yaml -t model.base_learning_rate=1e-5          # later files and key=value win
    python main.py -r logs/2026-11-21T15-00-00_cin-ldm-vq-f8 -t                     # go on where a run was interrupted

Options of Lightning's Trainer stand under `lightning.trainer` in the YAML or on the command line (--max_steps 1000).
"""

import argparse
import logging
import sys

from ldm.errors import LdmError
from ldm.util import instantiate_from_config

__all__ = ["instantiate_from_config", "main"]


def __getattr__(name: str):
    """What scripts and YAML import from `main`: DataModuleFromConfig, ImageLogger, SetupCallback ..."""
    import ldm.training

    return getattr(ldm.training, name)


def is_change(word: str) -> bool:
    """Whether a word of the command line is a key.sub=value for the config."""
    return "=" in word and not word.startswith("-")


def yes_or_no(text: str) -> bool:
    if text.lower() not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        raise argparse.ArgumentTypeError(f"expected yes or no, got {text!r}")
    return text.lower() in ("yes", "true", "t", "y", "1")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(*names: str, help: str, **options) -> None:
        parser.add_argument(*names, help=help, **options)

    switch = {"type": yes_or_no, "nargs": "?", "const": True, "metavar": "yes|no"}
    add("-b", "--base", nargs="*", default=[], metavar="CONFIG.yaml", help="configs, merged from left to right")
    add("-t", "--train", default=False, **switch, help="train (default: %(default)s)")
    add("--no-test", default=False, **switch, help="do not test after training (default: %(default)s)")
    add("-n", "--name", default="", help="name of the run (default: that of the first config)")
    add("-f", "--postfix", default="", help="what to append to the name of the run")
    add("-r", "--resume", default="", metavar="LOG", help="go on from a log folder, or from a checkpoint in one")
    add("-p", "--project", default="", metavar="LOG", help="the same, as old command lines call it")
    add("-l", "--logdir", default="logs", help="where the folder of the run is made (default: %(default)s)")
    add("-s", "--seed", type=int, help="what all chance derives from (default: 23, or that of the run to resume)")
    add("-d", "--debug", default=False, **switch, help="enter the debugger where it fails (default: %(default)s)")
    add("--scale_lr", default=True, **switch,
        help="multiply base_learning_rate by devices * batch size * accumulated batches (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    changes = [word for word in words if is_change(word)]  # apart: a switch would take the next for its value
    options, others = make_parser().parse_known_args([word for word in words if not is_change(word)])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from ldm.training.run import run

    try:
        return run(options, [*changes, *others])
    except LdmError as error:
        logging.error("main.py: %s", error)
        return error.exit_code
    except Exception:
        if options.debug:
            import pdb

            pdb.post_mortem()
        raise


if __name__ == "__main__":
    sys.exit(main())
