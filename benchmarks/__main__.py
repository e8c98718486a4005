"""Time and memory of this project beside diffusers and OpenVINO: the same random weights of full size, equal outputs.

    python -m benchmarks                        every case: 24 GB of disk, 10 GB of memory
    python -m benchmarks unet-512 decode start  those whose names begin so
    python -m benchmarks --list

Each case runs in a process of its own, both sides in turn, A-B-B-A. Printed are medians and, for each, the median over
the rounds of our seconds by theirs: of the clock, and of processor time, which what else the machine does changes
little. --json keeps every run. OpenVINO is left out where it is not installed.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import Case, Measured, Settings, every
from benchmarks.timing import ROOT, ratio
from benchmarks.weights import Files

COLUMNS = ("case", "ours", "theirs", "s", "s, theirs", "ratio", "of processor time", "goal", "apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="the start of a case's name")
    parser.add_argument("--list", action="store_true", help="tell the cases and what each is about")
    parser.add_argument("--against", default="", metavar="PEER", help="only cases whose other side begins so")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of A-B-B-A (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of whole pictures (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "benchmarks", help="for the weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    files = Files(options.folder.resolve())
    if options.one is not None:
        with tempfile.TemporaryDirectory(dir=files.folder) as scratch:
            case = every()[options.one]
            measured = case.run(case, Settings(files, options.rounds, options.steps, Path(scratch)))
            sys.stdout.write(json.dumps(summary(case, measured)) + "\n")
        return
    chosen = [
        (number, case) for number, case in enumerate(every())
        if any(case.name.startswith(word) for word in options.cases or [""]) and case.theirs.startswith(options.against)
        and ("openvino" not in case.theirs or importlib.util.find_spec("openvino"))
    ]  # fmt: skip
    if not chosen:
        parser.error(f"there is no such case; --list tells all {len(every())}")
    if options.list:
        sys.stdout.writelines(f"{case.title:68}{case.what}\n" for _, case in chosen)
        return
    from benchmarks.machine import ceilings, describe, load

    files.write()
    results: dict[str, Any] = {"machine": describe(), "ceilings": ceilings(), "cases": []}
    sys.stdout.write(f"{json.dumps(results['machine'])}\n{json.dumps(results['ceilings'])}\n\n")
    sys.stdout.write(row(COLUMNS) + row(["---"] * len(COLUMNS)))
    for number, case in chosen:
        command = [sys.executable, "-m", "benchmarks", "--one", number, "--folder", files.folder]
        command += ["--rounds", options.rounds, "--steps", options.steps]
        ran = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        if ran.returncode:
            sys.stdout.write(row([case.name, case.ours, case.theirs, "failed"]))
            continue
        result = json.loads(ran.stdout.splitlines()[-1]) | {"load": load()}
        results["cases"].append(result)
        sys.stdout.write("".join(map(row, lines(result))))
        sys.stdout.flush()
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))


def summary(case: Case, measured: Measured) -> dict[str, Any]:
    """What the JSON keeps of a case."""
    sides = {"ours": measured.ours, "theirs": measured.theirs}
    told = {
        "case": case.name, "what": case.what, "sides": [case.ours, case.theirs], "difference": measured.difference,
        "seconds": {name: side.wall for name, side in sides.items()},
        "processor": {name: side.cpu for name, side in sides.items()},
        "ratio": ratio(measured.ours.wall, measured.theirs.wall), "goal": case.goal,
        "processor ratio": ratio(measured.ours.cpu, measured.theirs.cpu),
    }  # fmt: skip
    peaks = {name: [facts["peak"] for facts in side.facts if "peak" in facts] for name, side in sides.items()}
    if case.peak_goal and all(peaks.values()):
        told |= {"peak": peaks, "peak ratio": ratio(peaks["ours"], peaks["theirs"]), "peak goal": case.peak_goal}
    return told


def lines(result: dict[str, Any]) -> list[list[str]]:
    """A case in the columns of the table, and its memory in a second line where it is measured."""
    def number(value: float | None, form: str = ".2f") -> str:
        return "" if value is None else f"{value:{form}}"

    medians = [number(median(result["seconds"][side])) for side in ("ours", "theirs")]
    made = [[result["case"], *result["sides"], *medians, number(result["ratio"]), number(result["processor ratio"]),
             number(result["goal"]), number(result["difference"], ".0e")]]  # fmt: skip
    if "peak" in result:
        medians = [f"{median(result['peak'][side]) / 1e9:.2f} GB" for side in ("ours", "theirs")]
        made.append(["its memory", *result["sides"], *medians, number(result["peak ratio"]), "",
                     number(result["peak goal"]), ""])  # fmt: skip
    return made


def row(cells) -> str:
    return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    main()
