"""Published weights are fetched from a hub on this machine: resumed, checked, linked, and refused where wrong."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub import COMMIT, serving

from ldm.download import MODELS, SHA256, fetch, is_right, link
from ldm.errors import OutputError, RequestError

ROOT = Path(__file__).parent.parent
WEIGHTS = os.urandom(300_000)
PUBLISHED = hashlib.sha256(WEIGHTS).hexdigest()
CHUNK = 10 << 20  # what the library of the hub writes at a time
LARGE = os.urandom(2 * CHUNK + 300_000)

# In a process of its own, because the library of the hub reads its settings when it is imported.
FETCH = """
import logging, sys
from ldm.download import MODELS, Published, fetch
from ldm.errors import LdmError
logging.basicConfig(format="%(message)s", stream=sys.stderr)
logging.getLogger("ldm").setLevel(logging.INFO)
sha256, force = sys.argv[2], sys.argv[3] == "True"
MODELS["tiny"] = Published("a tiny model", ("owner/first", "owner/mirror"), {"tiny.ckpt": sha256}, "models/tiny")
MODELS["other"] = Published("another", ("owner/first",), {"other.ckpt": ""}, "models/tiny")
MODELS["parts"] = Published("a folder", ("owner/first",), {"config.json": "", "weights.bin": ""}, "models/parts", "")
try:
    print(fetch(sys.argv[1], ".", force))
except LdmError as error:
    print(error, file=sys.stderr)
    sys.exit(type(error).__name__ == "OutputError" and 1 or error.exit_code)
"""


@pytest.fixture
def hub():
    with serving() as server:
        server.files["owner/first/tiny.ckpt"] = WEIGHTS
        yield server


@pytest.fixture
def started(hub, tmp_path):
    """Start fetching in tmp_path: started(alias, sha256, force) -> the process."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)

    def start(alias: str = "tiny", sha256: str = PUBLISHED, force: bool = False, **settings: str) -> subprocess.Popen:
        line = [sys.executable, "-c", FETCH, alias, sha256, str(force)]
        return subprocess.Popen(line, cwd=tmp_path, env={**environment, **settings}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


@pytest.fixture
def run(started):
    """Fetch, and give (exit code, stdout, stderr)."""

    def whole(*args, **kwargs) -> tuple[int, str, str]:
        with started(*args, **kwargs) as process:
            out, err = process.communicate(timeout=120)
            return process.returncode, out.strip(), err

    return whole


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------------------- fetching

@pytest.mark.parametrize("sha256", [PUBLISHED, ""], ids=["pinned", "as the hub says"])
def test_a_file_comes_under_its_own_name_and_is_linked_at_the_usual_one(sha256, run, tmp_path):
    code, out, err = run(sha256=sha256)
    assert (code, out) == (0, "models/tiny/model.ckpt"), err
    folder = tmp_path / "models" / "tiny"
    assert content(folder) == {"tiny.ckpt": WEIGHTS, "model.ckpt": WEIGHTS}
    assert os.readlink(folder / "model.ckpt") == "tiny.ckpt"


def test_what_is_there_and_right_is_not_fetched_again(run, hub, tmp_path):
    assert run()[0] == 0
    hub.asked.clear()
    code, _, err = run()
    assert code == 0
    assert "is there already" in err
    assert hub.asked == []
    assert run(sha256="")[0] == 0
    assert hub.ranges() == []


def test_several_files_make_a_folder_and_small_ones_are_checked_as_git_names_them(run, hub, tmp_path):
    hub.files |= {"owner/first/config.json": b'{"a": 1}', "owner/first/weights.bin": WEIGHTS}
    code, out, err = run("parts")
    assert (code, out) == (0, "models/parts"), err
    assert content(tmp_path / "models" / "parts") == {"config.json": b'{"a": 1}', "weights.bin": WEIGHTS}
    hub.sent["owner/first/config.json"] = b'{"a": 2}'
    (tmp_path / "models" / "parts" / "config.json").unlink()
    code, _, err = run("parts")
    assert code == 3
    assert "other bytes than were published" in err
    assert content(tmp_path / "models" / "parts") == {"weights.bin": WEIGHTS}


def test_a_mirror_takes_the_place_of_a_repository_that_is_gone(run, hub, tmp_path):
    hub.files = {"owner/mirror/tiny.ckpt": WEIGHTS}
    assert run()[0] == 0
    assert (tmp_path / "models" / "tiny" / "tiny.ckpt").read_bytes() == WEIGHTS


def test_a_file_in_the_cache_of_the_hub_is_linked_and_not_fetched(run, hub, tmp_path):
    snapshot = tmp_path / "home" / "hub" / "models--owner--first" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "tiny.ckpt").write_bytes(WEIGHTS)
    assert run()[0] == 0
    assert hub.ranges() == []
    assert (tmp_path / "models" / "tiny" / "tiny.ckpt").samefile(snapshot / "tiny.ckpt")
    (tmp_path / "models" / "tiny" / "tiny.ckpt").unlink()
    (snapshot / "tiny.ckpt").write_bytes(b"damaged")
    assert run()[0] == 0
    assert (tmp_path / "models" / "tiny" / "tiny.ckpt").read_bytes() == WEIGHTS
    assert (snapshot / "tiny.ckpt").read_bytes() == b"damaged"


# ------------------------------------------------------------------------------------------------------------- resuming

def test_a_connection_that_breaks_is_taken_up_where_it_broke(run, hub, tmp_path):
    hub.files["owner/first/tiny.ckpt"] = LARGE
    hub.cut = [CHUNK + 5000]
    code, _, err = run(sha256="")
    assert code == 0, err
    assert hub.ranges()[-1] == f"bytes={CHUNK}-"
    assert (tmp_path / "models" / "tiny" / "tiny.ckpt").read_bytes() == LARGE


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process by a signal of POSIX")
def test_a_process_that_was_killed_goes_on_where_it_was_when_run_again(started, run, hub, tmp_path):
    hub.files["owner/first/tiny.ckpt"] = LARGE
    hub.stall = 2 * CHUNK + 5000
    folder = tmp_path / "models" / "tiny"
    with started(sha256="") as process:
        assert hub.stalled.wait(60)
        while sum(path.stat().st_size for path in folder.iterdir()) < 2 * CHUNK:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    hub.stall = None
    hub.resume.set()
    (partial,) = folder.iterdir()
    assert partial.name.endswith(".incomplete")
    hub.asked.clear()
    code, _, err = run(sha256="")
    assert code == 0, err
    assert set(hub.ranges()) == {f"bytes={2 * CHUNK}-"}
    assert f"going on with tiny.ckpt from byte {2 * CHUNK:,} of {len(LARGE):,}" in err
    assert content(folder) == {"tiny.ckpt": LARGE, "model.ckpt": LARGE}


def test_a_part_of_another_version_is_not_mixed_in(run, hub, tmp_path):
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / f".tiny.ckpt.{16 * '0'}.incomplete").write_bytes(b"older")
    (folder / f".tiny.ckpt.{PUBLISHED[:16]}.incomplete").write_bytes(bytes(len(WEIGHTS) + 1))
    assert run()[0] == 0
    assert (folder / "tiny.ckpt").read_bytes() == WEIGHTS


# ------------------------------------------------------------------------------------------------------------- refusing

def test_wrong_bytes_are_refused_and_removed(run, hub, tmp_path):
    hub.sent["owner/first/tiny.ckpt"] = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])
    code, _, err = run()
    assert code == 3
    assert f"with other bytes than were published, which hash to {PUBLISHED}, so it was removed" in err
    assert list((tmp_path / "models" / "tiny").iterdir()) == []
    hub.sent.clear()
    assert run()[0] == 0


def test_another_file_under_the_published_name_is_refused_before_it_is_fetched(run, hub, tmp_path):
    hub.files["owner/first/tiny.ckpt"] = b"somebody else's"
    code, _, err = run()
    assert code == 3
    assert "owner/first has another tiny.ckpt than the one that was published" in err
    assert hub.ranges() == []


def test_an_answer_shorter_than_announced_is_no_file(run, hub, tmp_path):
    hub.sent["owner/first/tiny.ckpt"] = WEIGHTS[:1000]
    code, _, err = run()
    assert code == 3
    assert "did not come as announced" in err
    assert not (tmp_path / "models" / "tiny" / "tiny.ckpt").exists()


@pytest.mark.parametrize(("status", "word", "said"), [
    (403, "GatedRepo", "owner/first wants its terms accepted: log in at https://huggingface.co/owner/first"),
    (401, "GatedRepo", "hf auth login"),
    (404, "RepoNotFound", "there is no owner/first on the hub"),
    (401, "RepoNotFound", "it is gone, or private"),
    (500, "", "the hub answers 500 for tiny.ckpt"),
])
def test_each_refusal_of_the_hub_is_one_line_that_says_what_to_do(status, word, said, run, hub):
    hub.refused = {"owner/first": (status, word), "owner/mirror": (status, word)}
    code, out, err = run()
    assert (code, out) == (3, "")
    assert said in err
    assert "Traceback" not in err


def test_a_file_that_is_not_there_is_told(run, hub):
    hub.files = {"owner/first/else.ckpt": b"", "owner/mirror/else.ckpt": b""}
    code, _, err = run()
    assert code == 3
    assert "owner/first has no tiny.ckpt" in err
    assert "owner/mirror has no tiny.ckpt" in err


def test_without_a_connection_the_error_names_the_server(run):
    code, _, err = run(HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 3
    assert "no connection to http://127.0.0.1:9" in err
    code, _, err = run(HF_HUB_OFFLINE="1")
    assert code == 3
    assert "HF_HUB_OFFLINE is set" in err


# --------------------------------------------------------------------------------------------------- what is in the way

def test_a_file_of_other_content_is_left_alone_unless_it_is_to_be_replaced(run, tmp_path):
    file = tmp_path / "models" / "tiny" / "tiny.ckpt"
    file.parent.mkdir(parents=True)
    file.write_text("my own")
    code, _, err = run()
    assert code == 1
    assert "is not the published file: move it away, or take --force" in err
    assert file.read_text() == "my own"
    assert run(force=True)[0] == 0
    assert file.read_bytes() == WEIGHTS


def test_the_usual_name_passes_from_model_to_model_and_no_file_is_lost(run, hub, tmp_path):
    hub.files["owner/first/other.ckpt"] = b"other weights"
    folder = tmp_path / "models" / "tiny"
    assert run()[0] == 0
    code, _, err = run("other")
    assert code == 0
    assert "model.ckpt was another model and is now other.ckpt" in err
    assert content(folder) == {"tiny.ckpt": WEIGHTS, "other.ckpt": b"other weights", "model.ckpt": b"other weights"}


def test_a_file_of_the_users_at_the_usual_place_stays(tmp_path):
    (tmp_path / "new.ckpt").write_text("new")
    (tmp_path / "model.ckpt").write_text("mine")
    with pytest.raises(OutputError, match="move that away, or take --force"):
        link(tmp_path / "new.ckpt", tmp_path / "model.ckpt", force=False)
    assert (tmp_path / "model.ckpt").read_text() == "mine"
    link(tmp_path / "new.ckpt", tmp_path / "model.ckpt", force=True)
    assert (tmp_path / "model.ckpt").read_text() == "new"


def test_a_link_to_nowhere_is_replaced(tmp_path):
    (tmp_path / "model.ckpt").symlink_to("gone.ckpt")
    (tmp_path / "new.ckpt").write_text("new")
    link(tmp_path / "new.ckpt", tmp_path / "model.ckpt", force=False)
    assert (tmp_path / "model.ckpt").read_text() == "new"


def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(tmp_path):
    (tmp_path / "models").touch()
    with pytest.raises(OutputError, match="cannot write in"):
        fetch("v1.4", tmp_path)


# ------------------------------------------------------------------------------------------------------------ the table

def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(RequestError, match=r"no published model 'v9'.*v1\.5.*sdxl"):
        fetch("v9", tmp_path)


def test_every_published_model_says_where_it_comes_from_and_goes_to():
    for model in MODELS.values():
        assert model.folder.startswith("models/")
        assert all(repo.count("/") == 1 for repo in model.repos)
        assert all(sha256 == "" or SHA256.fullmatch(sha256) for sha256 in model.files.values())
        assert len(model.files) == 1 or not model.link


def test_a_file_is_known_by_either_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"hello\n")
    assert is_right(tmp_path / "a", "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03")
    assert is_right(tmp_path / "a", "ce013625030ba8dba906f756967f9e9ca394464a")
    assert not is_right(tmp_path / "a", 64 * "0")
    assert not is_right(tmp_path / "a", 40 * "0")
