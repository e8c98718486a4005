"""ldm.image.io: a PNG appears whole or not at all, under its own number, whoever else writes and whatever breaks."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ldm.errors import OutputError, RequestError
from ldm.image.io import Numbered, Outdir, check_outdir, write_png

# A process of its own: flags for what it should suffer, then a folder, a colour and a number of pictures.
WRITER = """
import errno, os, resource, sys
from PIL import Image
from ldm.errors import LdmError
from ldm.image import io

flags, folder, colour, number = sys.argv[1].split(","), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def no_links(*args, **kwargs):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))

if "no_links" in flags:
    os.link = no_links
if "small_files" in flags:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
if "nobody" in flags and os.geteuid() == 0:
    os.setuid(65534)
noise = Image.effect_noise((96, 96), 50)
picture = Image.merge("RGB", [Image.new("L", noise.size, colour), noise, noise])
out = io.Numbered(folder)
print("ready", flush=True)
try:
    for _ in range(number):
        print(out.save(picture).name, flush=True)
except LdmError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def writer(folder, colour=0, number=1, flags="", **options) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, flags, str(folder), str(colour), str(number)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def visible(folder) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def unfinished(folder) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


def refuse(*paths):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def is_whole(path) -> bool:
    with Image.open(path) as image:
        image.load()
    return image.size == (96, 96)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_picture_comes_back_pixel_for_pixel_with_nothing_left_beside_it(tmp_path, picture):
    path = Numbered(tmp_path).save(picture)
    assert path == tmp_path / "00000.png"
    assert os.listdir(tmp_path) == ["00000.png"]
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert np.array_equal(image, picture)


def test_the_same_picture_gives_the_same_bytes(tmp_path, picture):
    out = Numbered(tmp_path)
    assert out.save(picture).read_bytes() == out.save(picture).read_bytes()


def test_a_picture_gets_the_permissions_of_any_new_file(tmp_path, picture):
    (tmp_path / "new").touch()
    assert Numbered(tmp_path).save(picture).stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize("present, wanted", [
    ([], "00000.png"), (["00000.png"], "00001.png"), (["00007.png"], "00008.png"), (["00002.png", "00000.png"],
    "00003.png"), (["99999.png"], "100000.png"), (["100000.png"], "100001.png"),
    (["a.png", "7.png", "00009.jpg", "00009_b.png", "x00009.png", "grid-0009.png", "20261121100000.png"], "00000.png"),
])
def test_numbers_go_on_from_the_highest_present(tmp_path, picture, present, wanted):
    for name in present:
        (tmp_path / name).write_text("kept")
    assert Numbered(tmp_path).save(picture).name == wanted
    assert all((tmp_path / name).read_text() == "kept" for name in present)


def test_a_number_that_was_taken_meanwhile_is_passed_over(tmp_path, picture):
    out = Numbered(tmp_path)
    out.save(picture)
    (tmp_path / "00001.png").write_text("mine")
    (tmp_path / "00002.png").mkdir()
    assert out.save(picture).name == "00003.png"
    assert (tmp_path / "00001.png").read_text() == "mine"


def test_a_number_of_the_run_is_never_used_twice(tmp_path, picture):
    out = Numbered(tmp_path)
    out.save(picture).unlink()
    assert out.save(picture).name == "00001.png"


def test_outdir_is_laid_out_as_the_original(tmp_path, picture):
    for number in range(2):
        out = Outdir(tmp_path / "a" / "b")
        assert out.samples.save(picture) == tmp_path / "a" / "b" / "samples" / f"{number:05}.png"
        assert out.grids.save(picture) == tmp_path / "a" / "b" / f"grid-{number:04}.png"


def test_write_png_leaves_an_existing_file_unless_told_otherwise(tmp_path, picture):
    path = tmp_path / "out.png"
    path.write_text("mine")
    with pytest.raises(OutputError, match=r"out\.png is already there"):
        write_png(path, picture)
    assert path.read_text() == "mine"
    assert write_png(path, picture, overwrite=True) == path
    assert write_png(tmp_path / "other.png", picture).read_bytes() == path.read_bytes()
    assert visible(tmp_path) == ["other.png", "out.png"]
    assert not unfinished(tmp_path)


@pytest.mark.parametrize("flags", ["", "no_links"])
def test_processes_in_one_folder_never_overwrite_each_other(tmp_path, flags):
    colours, number = (10, 20, 30, 40), 25
    running = [writer(tmp_path, colour, number, flags) for colour in colours]
    outputs = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0] * 4, outputs
    assert visible(tmp_path) == [f"{i:05}.png" for i in range(len(colours) * number)]
    assert not unfinished(tmp_path)
    for colour, (stdout, _) in zip(colours, outputs):
        names = stdout.split()[1:]
        assert len(names) == number
        for name in names:
            with Image.open(tmp_path / name) as image:
                assert image.getpixel((0, 0))[0] == colour


def test_threads_in_one_folder_never_overwrite_each_other(tmp_path, picture):
    out = Numbered(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: out.save(picture), range(64)))
    assert len(set(paths)) == 64
    assert visible(tmp_path) == [f"{i:05}.png" for i in range(64)]


@pytest.mark.parametrize("flags", ["", "no_links"])
def test_a_kill_at_any_moment_leaves_only_whole_pictures(tmp_path, flags):
    delays = random.Random(0)
    promised = set()
    for _ in range(6):
        process = writer(tmp_path, number=100000, flags=flags)
        assert process.stdout.readline() == "ready\n"
        promised.add(process.stdout.readline().strip())
        time.sleep(delays.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, stderr
        promised.update(line for line in stdout.splitlines() if line.endswith(".png"))
    present = visible(tmp_path)
    assert len(promised) >= 6
    assert promised <= set(present)
    assert all(is_whole(tmp_path / name) for name in present)
    process = writer(tmp_path, flags=flags)
    stdout, _ = process.communicate(timeout=60)
    assert stdout.split()[1] > max(present)


@pytest.mark.parametrize("links", [True, False])
def test_the_name_is_given_to_the_very_file_that_is_whole_on_the_disk(tmp_path, picture, monkeypatch, links):
    synced = []

    def sync(descriptor, fsync=os.fsync):
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", sync)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    file = Numbered(tmp_path).save(picture).stat()
    assert synced == [(file.st_ino, file.st_size)]


def test_a_kill_between_writing_and_naming_leaves_no_picture(tmp_path):
    code = WRITER.replace("out = io", "io._publish = lambda *args: os.kill(os.getpid(), 9)\nout = io")
    process = subprocess.run([sys.executable, "-c", code, "", str(tmp_path), "0", "1"], capture_output=True)
    assert process.returncode == -signal.SIGKILL
    assert visible(tmp_path) == []
    assert len(unfinished(tmp_path)) == 1


def test_leftovers_of_killed_runs_are_removed_once_they_are_a_day_old(tmp_path, picture):
    for name, days in [(".ldm-old.tmp", 2), (".ldm-00000.png.tmp", 2), (".ldm-new.tmp", 0), (".other.tmp", 2)]:
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - days * 86400,) * 2)
    assert Numbered(tmp_path).save(picture).name == "00000.png"
    assert unfinished(tmp_path) == [".ldm-new.tmp", ".other.tmp"]


def test_without_hard_links_a_number_that_another_process_has_claimed_is_passed_over(tmp_path, picture, monkeypatch):
    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "00003.png").write_text("mine")
    (tmp_path / ".ldm-00004.png.tmp").touch()
    out = Numbered(tmp_path)
    assert [out.save(picture).name for _ in range(2)] == ["00005.png", "00006.png"]
    (tmp_path / "00007.png").write_text("mine too")
    assert out.save(picture).name == "00008.png"
    assert (tmp_path / "00007.png").read_text() == "mine too"
    assert unfinished(tmp_path) == [".ldm-00004.png.tmp"]
    with pytest.raises(OutputError, match="already there"):
        write_png(tmp_path / "00003.png", picture)


def test_a_full_disk_is_named_and_the_pictures_before_it_stay_whole(small_disk, picture):
    out = Numbered(small_disk)
    saved = []
    with pytest.raises(OutputError, match="no space left") as caught:
        for _ in range(100):
            saved.append(out.save(picture))
    assert "\n" not in str(caught.value)
    assert saved
    assert visible(small_disk) == [path.name for path in saved]
    assert not unfinished(small_disk)
    for path in saved:
        with Image.open(path) as image:
            assert np.array_equal(image, picture)
    saved[-1].unlink()
    assert out.save(picture).name == f"{len(saved):05}.png"


def test_a_full_disk_is_noticed_before_the_run(small_disk):
    with pytest.raises(OSError, match="space"):
        (small_disk / "ballast").write_bytes(bytes(128 * 1024))
    with pytest.raises(RequestError, match="no space left"):
        Outdir(small_disk)
    assert visible(small_disk) == ["ballast"]
    assert not unfinished(small_disk)


def test_a_limit_on_file_size_leaves_nothing_half_written(tmp_path):
    process = writer(tmp_path, flags="small_files")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.startswith("OutputError: cannot write in")
    assert os.listdir(tmp_path) == []


def test_a_folder_without_permission_is_refused_with_what_to_do(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    process = writer(folder, flags="nobody")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.startswith(f"OutputError: not allowed to write in {folder}")
    assert "--outdir" in stderr
    assert stderr.count("\n") == 1


def test_a_read_only_file_system_is_refused(small_disk, picture):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(RequestError, match="not allowed to write"):
        check_outdir(small_disk)
    with pytest.raises(OutputError, match="not allowed to write"):
        Numbered(small_disk).save(picture)


def test_a_folder_that_disappears_during_the_run_is_an_error(tmp_path, picture):
    out = Outdir(tmp_path / "out")
    out.samples.save(picture).unlink()
    (tmp_path / "out" / "samples").rmdir()
    with pytest.raises(OutputError, match="disappeared"):
        out.samples.save(picture)


@pytest.mark.parametrize("path", ["file", "file/out", "file/a/b"])
def test_an_outdir_under_a_file_is_refused_before_the_run(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RequestError, match="a file is in the way") as caught:
        Outdir(tmp_path / path)
    assert caught.value.exit_code == 2
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a system with /proc")
@pytest.mark.parametrize("path", ["/proc/pictures/mine", "/proc/self"])
def test_an_outdir_where_nothing_can_be_made_is_told_as_that(path):
    with pytest.raises(RequestError, match=f"nothing can be written to {path}: choose another folder with --outdir"):
        check_outdir(path)


def test_check_outdir_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    assert check_outdir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert check_outdir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert os.listdir(tmp_path / "a" / "b") == []
