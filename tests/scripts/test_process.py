"""Scripts as processes: terminals, signals, closed pipes and full disks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.image.io import read_image
from ldm.image.metadata import read_record

ROOT = Path(__file__).parents[2]
SCRIPTS = ["txt2img", "img2img", "inpaint", "sample_diffusion", "check_watermark"]
HEAVY = {"torch", "numpy", "PIL", "cv2", "transformers", "omegaconf", "safetensors", "pytorch_lightning"}


@pytest.fixture
def start(models, tmp_path):
    """Start a script, txt2img by default, in a process of its own: start("--n_iter", 3, stdout=...)."""

    def start(*options: object, script: str = "txt2img", kind: str = "text", **streams) -> subprocess.Popen:
        line = [sys.executable, ROOT / f"scripts/{script}.py", "--ckpt", models[kind], "--watermark", "off", "--safety",
                "off", "--skip_grid", "--n_samples", 1, "--device", "cpu", "--outdir", "out", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
        return subprocess.Popen(list(map(str, line)), cwd=tmp_path, env=environment, **streams)

    return start


def whole_pictures(folder: Path) -> list[str]:
    """The names of everything in a folder, each of which can be read as a picture."""
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        assert read_image(folder / name).size == (64, 64)
    return names


def manifest(outdir: Path) -> list[dict]:
    return [json.loads(line) for line in (outdir / "manifest.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_answers_without_loading_anything_heavy(name):
    code = (
        f"import runpy, sys; sys.argv = [{name!r}, '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'scripts' / f'{name}.py')!r}, run_name='__main__')\n"
        f"except SystemExit as end: print(end.code, {HEAVY!r} & set(sys.modules) or '', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.split() == ["0"]
    assert "usage:" in done.stdout
    assert "Exit codes: 0" in done.stdout or "Exits with 0" in done.stdout


def test_an_interrupted_run_exits_with_130_and_leaves_whole_pictures(start, tmp_path):
    run = start("--ddim_steps", 4, "--n_iter", 1000, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = run.stdout.readline()
    run.send_signal(signal.SIGINT)
    rest, said = run.communicate(timeout=60)
    assert run.returncode == 130
    finishing, end = said.splitlines()
    assert finishing == "finishing the current batch; Ctrl-C again stops at once"
    assert end.startswith("interrupted; the pictures written so far are whole; this goes on: python ")
    assert end.endswith("--n_iter 1000 --resume")
    printed = [Path(line).name for line in (first + rest).splitlines()]
    assert printed[0] == "00000.png"
    assert printed == whole_pictures(tmp_path / "out/samples")


def test_a_folder_of_pairs_that_was_interrupted_goes_on_with_the_rest(start, photo, mask, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number}.png").symlink_to(photo)
        (folder / f"{number}_mask.png").symlink_to(mask)
    run = start("--indir", folder, "--steps", 2, script="inpaint", kind="pairs", stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True)
    run.stdout.readline()
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert said.splitlines()[-1].endswith("--steps 2 --resume")
    (tmp_path / "out/manifest.jsonl").unlink()
    assert 0 < len(whole_pictures(tmp_path / "out")) < 200


def test_a_second_interrupt_stops_at_once(start, tmp_path):
    run = start("--ddim_steps", 1000, "--n_iter", 2, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True)
    while '"step": 3' not in run.stdout.readline():
        pass
    run.send_signal(signal.SIGINT)
    while "finishing" not in run.stderr.readline():
        pass
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert said.splitlines() == ["interrupted; the pictures written so far are whole"]
    assert whole_pictures(tmp_path / "out/samples") == []


def test_a_reader_that_goes_away_stops_no_picture(start, tmp_path):
    run = start("--ddim_steps", 1, "--n_iter", 4, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "out/samples/00000.png\n"
    run.stdout.close()
    said = run.stderr.read()
    run.stderr.close()
    assert run.wait(60) == 0
    assert len(said.splitlines()) == 1
    assert "Broken pipe" in said
    assert whole_pictures(tmp_path / "out/samples") == [f"0000{k}.png" for k in range(4)]


def test_two_runs_at_once_in_one_folder_write_all_their_pictures_and_each_goes_on_with_its_own(start, tmp_path):
    def both(*options):
        runs = [start("--ddim_steps", 1, "--n_iter", 6, "--seed", seed, *options, text=True, stdout=subprocess.PIPE,
                      stderr=subprocess.PIPE) for seed in (1, 2)]
        told = [run.communicate(timeout=120) for run in runs]
        assert [(run.returncode, said) for run, (_, said) in zip(runs, told)] == [(0, ""), (0, "")]
        return [out.split() for out, _ in told]

    one, other = both()
    names = whole_pictures(tmp_path / "out/samples")
    assert sorted(Path(line).name for line in one + other) == names
    assert len(names) == 12
    seeds = [read_record(tmp_path / path)["request"]["seed"] for path in one + other]
    assert seeds == [1] * 6 + [2] * 6
    files = {name: (tmp_path / "out/samples" / name).read_bytes() for name in names}
    for path in (one[2], other[4]):
        (tmp_path / path).unlink()
    assert both("--resume") == [[one[2]], [other[4]]]
    assert {name: (tmp_path / "out/samples" / name).read_bytes() for name in names} == files


def test_rows_are_drawn_while_the_pipe_that_they_come_from_is_open(start, tmp_path):
    def line(run, text):
        run.stdin.write(f"{text} --seed 3 --W 64\n")
        run.stdin.flush()

    def following(*options):
        return start("--from-file", "-", "--ddim_steps", 1, "--n_iter", 1, "--seed_mode", "image", *options, text=True,
                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    run = following()
    line(run, "a fox")
    assert run.stdout.readline() == "out/samples/00000.png\n"
    line(run, "a hare --ar 16:9")
    line(run, "a hare --H 100")
    line(run, "a hare")
    assert run.stdout.readline() == "out/samples/00003.png\n"
    first, second = (read_image(tmp_path / f"out/samples/0000{n}.png").tobytes() for n in (0, 3))
    assert first != second
    out, said = run.communicate(timeout=60)
    assert (run.returncode, out) == (1, "")
    assert said.splitlines() == [
        "standard input, line 2, 'a hare --ar 16:9 --seed 3 --W 64': unrecognized arguments: --ar 16:9",
        "standard input, line 3, 'a hare': H must be a positive multiple of 16, got 100; try 96",
    ]
    failed = [entry for entry in manifest(tmp_path / "out") if entry.get("error")]
    assert [(entry["index"], entry["row"]) for entry in failed] == [(1, "standard input, line 2"),
                                                                    (2, "standard input, line 3")]

    (tmp_path / "out/samples/00003.png").unlink()
    run = following("--resume")
    out, said = run.communicate("a fox --seed 3 --W 64\na hare\na hare\na hare --seed 3 --W 64\n", timeout=60)
    assert run.returncode == 0
    assert sorted(out.split()) == [f"out/samples/0000{n}.png" for n in (1, 2, 3)]
    assert read_image(tmp_path / "out/samples/00003.png").tobytes() == second


def test_an_interrupt_while_no_row_comes_loses_no_picture(start, tmp_path):
    run = start("--from-file", "-", "--ddim_steps", 1, "--n_iter", 1, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdin.write("a fox\n")
    run.stdin.flush()
    run.stdout.readline()
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130
    run.stdin.close()
    assert "interrupted; the pictures written so far are whole" in run.stderr.read()
    run.stdout.close(), run.stderr.close()
    assert whole_pictures(tmp_path / "out/samples") == ["00000.png"]


def test_a_full_disk_ends_the_run_with_one_line_and_nothing_half_written(start, tmp_path):
    resource = pytest.importorskip("resource", reason="needs a system that limits the size of files")

    def nearly_full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))  # a probe fits, a picture does not

    run = start("--ddim_steps", 1, "--n_iter", 4, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                preexec_fn=nearly_full)
    out, said = run.communicate(timeout=60)
    assert (run.returncode, out) == (1, "")
    assert said.splitlines() == ["cannot write in out/samples: File too large"]
    assert list((tmp_path / "out/samples").iterdir()) == []


@pytest.fixture
def terminal():
    """A pseudo-terminal of 100 columns: (the end to read, the end to hand to a process)."""
    pty = pytest.importorskip("pty", reason="needs a system with pseudo-terminals")
    import fcntl
    import struct
    import termios

    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    yield reader, writer
    os.close(reader)


def everything(reader: int) -> str:
    shown = b""
    try:
        while part := os.read(reader, 4096):
            shown += part
    except OSError:  # how Linux says that the other end is closed
        pass
    return shown.decode()


def test_a_terminal_gets_one_bar_over_the_whole_run_and_paths_on_lines_of_their_own(start, terminal):
    reader, writer = terminal
    run = start("--ddim_steps", 6, "--sampler", "ddim", "--n_iter", 2, stdout=writer, stderr=writer)
    os.close(writer)
    lines = everything(reader).replace("\r", "\n").splitlines()
    assert run.wait(60) == 0
    # Asked for 6 of 1000 steps, DDIM takes every 166th, which makes 7: what is counted is what is walked.
    bars = [line for line in lines if "step/s]" in line]
    assert all("/14 [" in line for line in bars)
    assert any("100%" in line and "14/14 [" in line for line in bars)
    assert "out/samples/00000.png" in lines
    assert "out/samples/00001.png" in lines


def test_a_quiet_run_shows_no_bar_on_a_terminal(start, terminal):
    reader, writer = terminal
    run = start("--ddim_steps", 2, "--n_iter", 1, "-q", stdout=subprocess.DEVNULL, stderr=writer)
    os.close(writer)
    assert everything(reader) == ""
    assert run.wait(60) == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_fills_up_says_so(start, tmp_path):
    disk = tmp_path / "out"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "none", disk], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        run = start("--ddim_steps", 1, "--n_iter", 8, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        out, said = run.communicate(timeout=60)
        assert run.returncode == 1
        full = "no space left to write in out/samples: free some, or choose another folder with --outdir"
        assert said.splitlines() == [full]
        assert 0 < len(out.splitlines()) < 8
        assert whole_pictures(disk / "samples") == [Path(line).name for line in out.splitlines()]
    finally:
        subprocess.run(["umount", disk], check=True)
