"""ldm.image.metadata: what a PNG says of its making comes back as it was, and other tools' pictures can be read."""

import json
import math
import time
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from ldm.errors import ImageError
from ldm.image.io import read_image, write_png
from ldm.image.metadata import (
    SAMPLER_LABELS,
    format_parameters,
    parse_parameters,
    read_parameters,
    read_record,
    sampler_label,
    to_pnginfo,
)

SETTINGS = {"Steps": 50, "Sampler": "PLMS", "CFG scale": 7.5, "Seed": 42, "Size": "512x512",
            "Model hash": "0123456789", "Model": "sd-v1-4"}
LINE = "Steps: 50, Sampler: PLMS, CFG scale: 7.5, Seed: 42, Size: 512x512, Model hash: 0123456789, Model: sd-v1-4"

TEXTS = [
    "a photograph of an astronaut riding a horse",
    "größer, café, naïve",  # within latin-1
    "富士山 🗻 Привет",  # beyond it
    'she said "no", and (left:1.2), [or] {not}',
    "two\nlines",
    "blank\n\nlines\n\n\nbetween",
    "a back\\slash, a tab\tand a \\n that is no newline",
    "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1",
    "BREAK: a, b: c, d",
    "<lora:thing:0.8> AND other",
    "\u2028separators\x85that\x0bare\x0cno\x1enewlines",
    "e\u0301 is not \u00e9",
    "100,000 words " * 20000,
]
IDS = [text[:12].encode("ascii", "replace").decode() for text in TEXTS]


def saved(tmp_path, info) -> Path:
    return write_png(tmp_path / "picture.png", Image.new("RGB", (8, 8)), info, overwrite=True)


def chunk(name: str, text: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text(name, text)
    return info


def test_parameters_are_written_in_the_form_of_the_web_ui():
    assert format_parameters("a horse", "blurry, hands", SETTINGS) == f"a horse\nNegative prompt: blurry, hands\n{LINE}"


def test_what_is_empty_or_none_leaves_no_trace_in_the_parameters():
    assert format_parameters("a horse", "", {**SETTINGS, "Eta": None}) == f"a horse\n{LINE}"
    assert format_parameters("", "", SETTINGS) == LINE


@pytest.mark.parametrize("value, written", [
    (7.5, "7.5"), (7.0, "7"), (0, "0"), (0.1 + 0.2, "0.30000000000000004"), (True, "True"), ("plain", "plain"),
    ("a, b", '"a, b"'), ("a: b", '"a: b"'), ("two\nlines", r'"two\nlines"'), ('a "b"', r'"a \"b\""'),
    (" spaced ", '" spaced "'), ("höher, weiter", '"höher, weiter"'), ("C:\\models\\a, b", r'"C:\\models\\a, b"'),
])
def test_a_value_is_quoted_where_it_would_be_misread(value, written):
    text = format_parameters("", "", {"Odd": value, "Steps": 1, "Seed": 2})
    assert text == f"Odd: {written}, Steps: 1, Seed: 2"
    assert parse_parameters(text)["Odd"] == (written if written[0] != '"' else value)


@pytest.mark.parametrize("negative", ["", "ugly, (hands:1.3)", "two\nlines", "x\nNegative prompt: y"])
@pytest.mark.parametrize("prompt", ["", *TEXTS], ids=["", *IDS])
def test_parameters_come_back_as_they_were(prompt, negative):
    parsed = parse_parameters(format_parameters(prompt, negative, SETTINGS))
    assert parsed.pop("Prompt") == prompt.strip()
    assert parsed.pop("Negative prompt") == negative
    assert parsed == {key: str(value) for key, value in SETTINGS.items()}


@pytest.mark.parametrize("text, wanted", [
    ("", {}),
    ("only a prompt", {"Prompt": "only a prompt"}),
    ("a prompt: with, colons: in it", {"Prompt": "a prompt: with, colons: in it"}),
    ("a\nNegative prompt: b", {"Prompt": "a", "Negative prompt": "b"}),
    ("Negative prompt: b\nSteps: 1, Seed: 2, Size: 8x8",
     {"Negative prompt": "b", "Steps": "1", "Seed": "2", "Size": "8x8"}),
    ("a\r\nNegative prompt: b\r\nSteps: 1, Seed: 2, Size: 8x8",
     {"Prompt": "a", "Negative prompt": "b", "Steps": "1", "Seed": "2", "Size": "8x8"}),
    # As various versions of the web UI and its extensions wrote it.
    ('a, b\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 3, Lora hashes: "one: 0a1b, two: 2c3d", '
     "Hires upscaler: 4x_foo-Bar, Denoising strength: 0.55, Version: v1.6.0-2-g4afaaf8a",
     {"Prompt": "a, b", "Steps": "20", "Sampler": "DPM++ 2M Karras", "CFG scale": "7", "Seed": "3",
      "Lora hashes": "one: 0a1b, two: 2c3d", "Hires upscaler": "4x_foo-Bar", "Denoising strength": "0.55",
      "Version": "v1.6.0-2-g4afaaf8a"}),
    ('a\nSteps: 2, Seed: 3, Odd: "never closed, Size: 8x8', {"Prompt": "a", "Steps": "2", "Seed": "3",
                                                             "Odd": '"never closed', "Size": "8x8"}),
    (r'a' '\n' r'Steps: 2, Seed: 3, Odd: "no \q escape", Size: 8x8',
     {"Prompt": "a", "Steps": "2", "Seed": "3", "Odd": r'"no \q escape"', "Size": "8x8"}),
])
def test_parameters_of_other_tools_are_read(text, wanted):
    assert parse_parameters(text) == {"Prompt": "", "Negative prompt": "", **wanted}


@pytest.mark.parametrize("text", ["word " * 200000, "a: " * 200000, 'a: "' * 200000, 'a: "\\' * 200000, " \n" * 200000])
def test_hostile_parameters_are_read_in_a_moment(text):
    started = time.monotonic()
    parse_parameters("x\n" + text + "x")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("sampler, schedule, label", [
    ("plms", "default", "PLMS"), ("dpmpp_2m", "default", "DPM++ 2M"), ("dpmpp_2m", "karras", "DPM++ 2M Karras"),
    ("dpmpp_2m_sde", "exponential", "DPM++ 2M SDE Exponential"), ("euler_a", "trailing", "Euler a"),
    ("dpm_solver", "default", "DPM-Solver++"), ("mine", "default", "mine"),
])
def test_samplers_have_the_names_of_the_web_ui(sampler, schedule, label):
    assert sampler_label(sampler, schedule) == label


def test_no_two_samplers_share_a_name():
    assert len(set(SAMPLER_LABELS.values())) == len(SAMPLER_LABELS)


@pytest.mark.parametrize("text", TEXTS, ids=IDS)
def test_both_texts_survive_the_file(tmp_path, text):
    parameters = format_parameters(text, text, SETTINGS)
    record = {"request": {"prompt": text, text: 1}}
    path = saved(tmp_path, to_pnginfo(parameters, record))
    assert read_record(path) == record
    with Image.open(path) as image:
        assert image.text["parameters"] == parameters
        assert json.loads(image.text["ldm"]) == record


def test_text_beyond_latin_1_is_marked_as_utf_8(tmp_path):
    latin = saved(tmp_path, to_pnginfo("größer", {})).read_bytes()
    assert b"tEXtparameters\0gr\xf6\xdfer" in latin
    wider = saved(tmp_path, to_pnginfo("größer 🗻", {})).read_bytes()
    assert b"iTXtparameters\0\0\0\0\0" + "größer 🗻".encode() in wider


def test_a_prompt_that_is_no_unicode_is_kept_in_the_record(tmp_path):
    prompt = b"caf\xe9".decode("utf-8", "surrogateescape")
    path = saved(tmp_path, to_pnginfo(prompt, {"prompt": prompt}))
    assert read_record(path) == {"prompt": prompt}
    assert read_parameters(path)["Prompt"] == "caf?"


def test_record_keeps_values_exactly(tmp_path):
    record = {"scale": 0.1 + 0.2, "tiny": 5e-324, "large": 2**64, "none": None, "on": True, "list": [1, [2.0]],
              "dict": {"b": 1, "a": {}}, "empty": ""}
    back = read_record(saved(tmp_path, to_pnginfo("", record)))
    assert back == record
    assert list(back) == list(record)
    assert list(back["dict"]) == ["b", "a"]


def test_record_takes_paths_as_text_and_tuples_as_lists(tmp_path):
    path = saved(tmp_path, to_pnginfo("", {"ckpt": Path("models/a.ckpt"), "sizes": (1, 2)}))
    assert read_record(path) == {"ckpt": str(Path("models/a.ckpt")), "sizes": [1, 2]}


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), b"raw"])
def test_record_refuses_what_would_not_come_back(value):
    with pytest.raises((ValueError, TypeError)):
        to_pnginfo("", {"value": value})


def test_the_pixels_and_the_bytes_do_not_depend_on_when_they_are_written(tmp_path):
    first = saved(tmp_path, to_pnginfo("a", SETTINGS)).read_bytes()
    assert saved(tmp_path, to_pnginfo("a", SETTINGS)).read_bytes() == first


@pytest.mark.parametrize("info", [None, chunk("ldm2", "{}"), chunk("parameters", "a cat")])
def test_a_picture_without_a_record_says_so(tmp_path, info):
    with pytest.raises(ImageError, match=r"picture\.png carries no record"):
        read_record(saved(tmp_path, info))


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "[1, 2]", "null", '"text"', "[" * 100000])
def test_a_damaged_record_says_so(tmp_path, text):
    with pytest.raises(ImageError, match=r"record in .*picture\.png is damaged") as caught:
        read_record(saved(tmp_path, chunk("ldm", text)))
    assert "\n" not in str(caught.value)


def test_a_record_whose_bytes_were_changed_says_so(tmp_path):
    path = saved(tmp_path, to_pnginfo("", {"seed": 42}))
    path.write_bytes(path.read_bytes().replace(b"42}", b"43}"))
    with pytest.raises(ImageError):
        read_record(path)


@pytest.mark.parametrize("read", [read_record, read_parameters])
def test_a_file_that_is_no_whole_picture_is_an_image_error(tmp_path, read):
    path = saved(tmp_path, to_pnginfo("a", {}))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ImageError):
        read(path)
    with pytest.raises(ImageError, match="there is no picture"):
        read(tmp_path / "absent.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.jpg")
    with pytest.raises(ImageError, match="carries no"):
        read(tmp_path / "picture.jpg")


def test_parameters_after_the_pixels_are_found(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add(b"tEXt", b"parameters\0a cat\n" + LINE.encode(), after_idat=True)
    parsed = read_parameters(saved(tmp_path, info))
    assert parsed["Prompt"] == "a cat"
    assert parsed["Seed"] == "42"


def test_metadata_of_an_input_does_not_reach_what_is_made_of_it(tmp_path):
    path = saved(tmp_path, to_pnginfo("secret", {"prompt": "secret"}))
    again = write_png(tmp_path / "again.png", read_image(path))
    assert b"secret" in path.read_bytes()
    assert b"secret" not in again.read_bytes()
