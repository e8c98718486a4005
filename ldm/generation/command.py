"""What scripts do around their own few lines: options in, pictures out, an exit code. Imports torch only to draw."""

import logging
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ldm.errors import LdmError, RequestError
from ldm.generation.arguments import Parser, pick
from ldm.generation.arrivals import Arrivals
from ldm.generation.axes import read_axes
from ldm.generation.events import Tell, as_json, as_path
from ldm.generation.options import AHEAD, INTERRUPTED, ModelOptions, RunOptions, find, find_checkpoint
from ldm.generation.request import Request
from ldm.generation.rows import Row, check_rows, read_rows, row_parser, spread
from ldm.generation.settings import toml

logger = logging.getLogger(__name__)


def execute(main: Callable[[], int]) -> int:
    """Run a script and give its exit code; what goes wrong in a way that we know is one line on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return main()
    except LdmError as error:
        logger.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        logger.error("interrupted; the pictures written so far are whole")
        return INTERRUPTED


def teller(args: Namespace) -> Tell:
    """What tells on stdout how a run goes on: the paths of the files, or with --json every event."""
    line = as_json if args.json else as_path

    def tell(event: str, **facts: Any) -> None:
        if text := line(event, facts):
            show(text)

    return tell


def show(line: str) -> None:
    """Print a line. A reader that has gone away (`| head -1`) stops no picture."""
    from tqdm import tqdm

    if sys.stdout is None:  # closed by the shell, with >&-
        return
    try:
        with tqdm.external_write_mode():  # above the progress bar
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    except OSError as error:
        logger.warning("cannot print any more (%s); the pictures are written all the same", error.strerror)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def set_up(args: Namespace) -> None:
    """Settle what holds for the whole process: how much is logged, and whether a library may reach for the network."""
    logging.getLogger().setLevel(logging.ERROR if args.verbosity < 0 else logging.WARNING)
    logging.getLogger("ldm").setLevel({-1: logging.ERROR, 0: logging.INFO, 1: logging.DEBUG}[args.verbosity])
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def rows(
    args: Namespace, add_options: Callable[[Parser], None], needs: Sequence[str] = ()
) -> list[Row] | Arrivals:
    """The rows of the file, or as many copies of the one prompt as there are pictures in a batch.

    A row of the file may have the options of `add_options`; `needs` are those that it cannot do without.
    """
    prompt, run, axes = Row(pick(Request, args)), pick(RunOptions, args), read_axes(args.xy)
    if not args.from_file:
        return spread(prompt, axes, add_options) if axes else [prompt] * run.batch_size
    parse = row_parser(add_options, args, needs)
    if args.from_file != "-":
        rows = read_rows(args.from_file, parse)
        return [cell for row in rows for cell in spread(row, axes, add_options)] if axes else rows
    if axes:
        raise RequestError("--xy cannot be drawn of rows that are still to come: write them to a file for --from-file")
    if args.print_config:
        return []
    if sys.stdin is None:
        raise RequestError("--from-file - needs standard input, which is closed")
    return Arrivals(sys.stdin.fileno(), parse, AHEAD * run.batch_size)


def explain(args: Namespace, rows: Sequence[Row] = ()) -> int:
    """Print each option and where it is from, then what is particular to each row; nothing is drawn."""
    origins, (yaml, path) = args.print_config, in_the_yaml(args)
    for line in origins.lines(args, yaml, path):
        show(line)
    for row in dict.fromkeys(rows):
        own = {field.name: getattr(row.request, field.name) for field in fields(Request)}
        told = [f"{origins.name(name)} = {toml(value)}" for name, value in own.items()
                if value != getattr(args, name, getattr(Request, name))]
        if told:
            show(f"# {row.place or 'row'}: {', '.join(told)}")
    return 0


def in_the_yaml(args: Namespace) -> tuple[dict[str, int], str]:
    """The sizes that the model's YAML settles, and its path, as far as that is known before the weights are opened."""
    from ldm.config import load_config, model_section
    from ldm.generation.geometry import geometry

    model = pick(ModelOptions, args)
    checkpoint = find_checkpoint(model)
    beside = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.yaml"
    path = find(model.config) if model.config else beside
    if not path.is_file():
        return {}, ""
    sizes = geometry(model_section(load_config(path), path))
    latents = {"channels": sizes.channels, "factor": sizes.factor}
    drawn_over = getattr(args, "init_img", None) and not getattr(args, "varies", False)
    drawn = {} if drawn_over else {"height": sizes.side, "width": sizes.side}
    return latents | drawn, str(path)


def draw(args: Namespace, rows: Sequence[Row] | Arrivals, made_for: Sequence[str] = ()) -> int:
    """Draw the rows with the model that the options name, print the path of each file, and give the exit code.

    made_for: the classes of the models that the script is made for, by name; () where it takes them all.
    """
    set_up(args)
    known, model, run = [] if isinstance(rows, Arrivals) else rows, pick(ModelOptions, args), pick(RunOptions, args)
    lines = len({row.place for row in known if row.place})
    if 0 < lines < len(known) and not run.xy:
        logger.info("%s: with braces, %d lines are %d prompts", args.from_file, lines, len(known))
    if args.print_config:
        check_rows(known)
        return explain(args, known)

    from ldm.generation.loading import choose, open_run

    try:
        chosen = choose(model, made_for)
        chosen.geometry.check(getattr(args, "channels", None), getattr(args, "factor", None))
    except LdmError:
        check_rows(known)  # what is wrong with the rows comes first
        raise
    ready = open_run(known, model, run, teller(args), chosen)
    return end(ready.follow(rows) if isinstance(rows, Arrivals) else ready.draw(rows), how_to_resume(args))


def end(summary: Any, hint: str = "") -> int:
    """The exit code of a run, from its Summary; of one that was interrupted, that what is there is whole."""
    if summary.interrupted:
        logger.error("interrupted; the pictures written so far are whole%s", hint)
    return summary.exit_code


def how_to_resume(args: Namespace) -> str:
    """The command that goes on with this one, where there is such a command."""
    if not hasattr(args, "go_on"):
        return ""
    words = [word for word in sys.argv if word != "--resume"]
    same = ", with the same input" if args.from_file == "-" else ""
    return f"; this goes on{same}: python {shlex.join([*words, '--resume'])}"


def draw_files(args: Namespace, names: Mapping[Request, str]) -> int:
    """As `draw`, each picture into the output folder under its own name.

    What is there already is left out; with --resume, as far as the manifest says that it is what it was.
    """
    set_up(args)
    if args.print_config:
        return explain(args, list(map(Row, names)))
    model, run = pick(ModelOptions, args), pick(RunOptions, args)
    missing = {request: name for request, name in names.items()
               if run.go_on or not (Path(args.outdir) / name).exists()}
    if len(missing) < len(names):
        there = len(names) - len(missing)
        logger.warning("%d of %d pictures are in %s already and left as they are", there, len(names), args.outdir)
    if not missing:
        return 0

    from ldm.generation.loading import choose, open_run

    rows = [Row(request, name) for request, name in missing.items()]
    ready = open_run(rows, model, run, teller(args), choose(model))
    return end(ready.draw_files(missing), how_to_resume(args))


def mask_pairs(folder: str) -> list[tuple[Path, Path]]:
    """Each NAME.png of a folder that has a NAME_mask.png, with its mask. Raises RequestError where there is no pair."""
    if not Path(folder).is_dir():
        raise RequestError(f"there is no folder {folder}")
    pairs = [(mask.with_name(mask.name.replace("_mask.png", ".png")), mask) for mask in Path(folder).glob("*_mask.png")]
    if not pairs:
        raise RequestError(f"{folder} has no pair NAME.png, NAME_mask.png in it")
    return sorted(pairs)


def replay(args: Namespace) -> int:
    """Make the picture `args.replay` again, with the settings that it records, and give the exit code.

    How it is run may be changed on the command line, and which weights run is said there alone.
    """
    set_up(args)
    if args.print_config:
        return explain(args)

    from ldm.generation.adapters import differences, recall
    from ldm.generation.loading import choose, open_run
    from ldm.generation.record import HOW, Replay

    recorded = Replay.read(args.replay)
    logger.info("%s was made with %s (sha256 %s)", args.replay, recorded.checkpoint, recorded.sha256[:10])
    how = recorded.how | recall(recorded.how)
    model, run = prefer(pick(ModelOptions, args), how), prefer(pick(RunOptions, args), how)
    ready = open_run(list(map(Row, recorded.requests)), model, run, teller(args), choose(model))
    if ready.recorder.sha256 != recorded.sha256:
        logger.warning("%s is another checkpoint: the picture will differ", ready.recorder.checkpoint)
    then, now = recorded.how, ready.recorder.how
    for name in HOW:
        if now[name] != then[name]:
            logger.warning("the picture was made with %s %r, not %r: it may differ", name, then[name], now[name])
    for line in differences(then, now):
        logger.warning("%s", line)
    return end(ready.redraw(recorded))


def prefer(given: ModelOptions | RunOptions, recorded: Mapping[str, Any]) -> ModelOptions | RunOptions:
    """The options that were given, and where they are the default, those recorded."""
    silent = [one.name for one in fields(given) if one.name in recorded and getattr(given, one.name) == one.default]
    return replace(given, **{name: recorded[name] for name in silent})
