"""What programs and people are told on stdout while a run goes on."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import write_model

from ldm.errors import OutOfMemory, RequestError
from ldm.generation import arguments
from ldm.generation.command import draw, draw_files
from ldm.generation.events import as_json, as_path, telling
from ldm.generation.request import Request
from ldm.generation.rows import Row


@dataclass
class Counts:
    made: int = 0
    failed: int = 0


def test_people_are_told_the_paths_alone():
    assert as_path("saved", {"path": Path("a.png"), "kind": "picture"}) == "a.png"
    assert as_path("step", {"step": 3}) is None


def test_an_event_is_one_line_of_json_whatever_is_in_it():
    line = as_json("saved", {"path": Path("a.png"), "prompt": "two\nlines “quoted”"})
    assert "\n" not in line
    assert json.loads(line) == {"event": "saved", "path": "a.png", "prompt": "two\nlines “quoted”"}


def test_a_run_that_ends_early_says_done_with_the_reason_and_what_it_had_made():
    told, summary = [], Counts()
    with pytest.raises(OutOfMemory), telling(lambda event, **facts: told.append((event, facts)), summary, pictures=2):
        summary.made = 1
        raise OutOfMemory("too large")
    (first, facts), (last, end) = told
    assert (first, facts) == ("started", {"pictures": 2})
    assert (last, end["made"], end["failed"], end["error"]) == ("done", 1, 0, "too large")
    assert end["seconds"] >= 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def options_of(model, outdir, *options):
    """The options of a small run."""
    parser = arguments.Parser(None)
    arguments.add_prompts(parser, "a fox")
    arguments.add_sampling(parser, sampler="ddim", scale=1.0)
    arguments.add_size(parser)
    arguments.add_model(parser)
    arguments.add_output(parser, str(outdir), n_iter=1, batch_size=2)
    return parser.parse_args(["--ckpt", str(model), "--steps", "3", "--H", "32", "--W", "32", "--device", "cpu",
                              "--watermark", "off", *options])


def told(capsys, model, outdir, *options) -> list[str]:
    """Draw in this process, and give the lines on stdout."""
    args = options_of(model, outdir, *options)
    draw(args, [Row(arguments.pick(Request, args))] * 2)
    return capsys.readouterr().out.splitlines()


def test_a_run_tells_its_events_in_order_with_stable_names(capsys, model, tmp_path):
    lines = told(capsys, model, tmp_path, "--json", "--seed", "7")
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["started", "batch", "step", "step", "step", "saved", "saved",
                                                    "saved", "done"]
    asked = {"prompt": "a fox", "negative_prompt": "", "seed": 7, "class_label": None}
    assert events[0] == {"event": "started", "pictures": 2, "batches": 1, "steps": 3, "outdir": str(tmp_path)}
    assert events[1] == {"event": "batch", "batch": 1, "of": 1, "steps": 3, "pictures": [asked, asked]}
    assert events[2] == {"event": "step", "batch": 1, "step": 1, "of": 3}
    assert events[5] == {"event": "saved", "path": str(tmp_path / "samples/00000.png"), "kind": "picture", **asked}
    assert events[7] == {"event": "saved", "path": str(tmp_path / "grid-0000.png"), "kind": "grid"}
    done = events[8]
    assert (done["made"], done["failed"], done.keys()) == (2, 0, {"event", "made", "failed", "seconds"})


def test_without_json_the_paths_are_all_that_is_printed(capsys, model, tmp_path):
    lines = told(capsys, model, tmp_path, "--preview", "1")
    assert lines == [str(tmp_path / name) for name in ("samples/00000.png", "samples/00001.png", "grid-0000.png")]
    assert (tmp_path / "preview.png").exists()


def test_a_preview_changes_no_picture(capsys, model, tmp_path):
    files = {}
    for name, options in (("with", ("--preview", "1")), ("without", ())):
        told(capsys, model, tmp_path / name, *options)
        files[name] = (tmp_path / name / "samples/00001.png").read_bytes()
    assert files["with"] == files["without"]


def test_a_preview_takes_the_place_of_no_picture(model, tmp_path):
    args = options_of(model, tmp_path, "--preview", "1")
    with pytest.raises(RequestError, match="leave --preview out"):
        draw_files(args, {arguments.pick(Request, args): "preview.png"})
    assert not list(tmp_path.iterdir())


def test_each_picture_that_fails_is_an_event(capsys, model, tmp_path):
    lines = told(capsys, model, tmp_path, "--json", "--scale", "1e38")
    events = [json.loads(line) for line in lines]
    failed = [event for event in events if event["event"] == "failed"]
    assert [event["prompt"] for event in failed] == ["a fox", "a fox"]
    assert "not finite" in failed[0]["error"]
    assert (events[-1]["event"], events[-1]["made"], events[-1]["failed"]) == ("done", 0, 2)


@pytest.mark.parametrize(("options", "levels"), [
    (("-q",), {"ERROR"}), ((), {"WARNING", "INFO"}), (("-v",), {"WARNING", "INFO", "DEBUG"}),
])
def test_quiet_leaves_the_errors_and_verbose_tells_more(model, tmp_path, capsys, caplog, options, levels):
    told(capsys, model, tmp_path, "--skip_grid", "--watermark", "StableDiffusionV1", "--scale", "7", *options)
    seen = {record.levelname for record in caplog.records if record.name.startswith("ldm")}
    assert seen <= levels
    assert seen >= levels & {"INFO", "DEBUG"}
