"""What a PNG says about its making: `parameters`, which other tools read, and `ldm`, from which it can be replayed."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from ldm.errors import ImageError
from ldm.image.io import open_image

PARAMETERS = "parameters"
RECORD = "ldm"

# The names that AUTOMATIC1111's web UI gives to the samplers.
SAMPLER_LABELS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "plms": "PLMS",
    "dpm_solver": "DPM-Solver++",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2s_a": "DPM++ 2S a",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "unipc": "UniPC",
}
LABELLED_SCHEDULES = ("karras", "exponential")

NEGATIVE = "Negative prompt:"
# A key is short, so that a long prompt is not searched again from each of its letters.
SETTING = re.compile(r'(\w[\w \-/]{0,80}): *("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
# Fewer settings than this, and the last line is taken for a part of the prompt.
FEWEST_SETTINGS = 3


def sampler_label(sampler: str, schedule: str = "default") -> str:
    """The web UI's name of a sampler, e.g. `DPM++ 2M Karras`; one that it does not know keeps its own."""
    label = SAMPLER_LABELS.get(sampler, sampler)
    return f"{label} {schedule.title()}" if schedule in LABELLED_SCHEDULES else label


def format_parameters(prompt: str, negative_prompt: str, settings: Mapping[str, Any]) -> str:
    """The text that AUTOMATIC1111's web UI writes: the prompt, the negative one, and a line of `Steps: 50, Seed: 42`.

    `settings` keeps its order and skips what is None. The form cannot tell a prompt line that starts with "Negative
    prompt:" from the real one: only the record is exact.
    """
    pairs = ", ".join(f"{key}: {_quote(value)}" for key, value in settings.items() if value is not None)
    negative = f"{NEGATIVE} {negative_prompt}" if negative_prompt else ""
    return "\n".join(part for part in (prompt, negative, pairs) if part)


def parse_parameters(text: str) -> dict[str, str]:
    """Read `parameters` back: `Prompt`, `Negative prompt` and each setting under its own name, all of them text."""
    body, _, last = text.strip().rpartition("\n")
    settings = {key: _unquote(value) for key, value in SETTING.findall(last)}
    if len(settings) < FEWEST_SETTINGS:
        body, settings = text.strip(), {}
    positive, _, negative = f"\n{body}".partition(f"\n{NEGATIVE}")
    return {"Prompt": positive.strip(), "Negative prompt": negative.strip(), **settings}


def to_pnginfo(parameters: str, record: Mapping[str, Any]) -> PngInfo:
    """The two text chunks for a PNG: `parameters` for other tools and `record` as JSON.

    `record` holds what JSON can hold, and paths. Numbers come back exact, tuples as lists, paths as text.
    """
    info = PngInfo()
    # What no encoding can express (half a surrogate pair, from a byte that was not UTF-8) becomes a question mark here;
    # the JSON is plain ASCII and keeps it.
    info.add_text(PARAMETERS, parameters.encode("utf-8", "replace").decode("utf-8"))
    info.add_text(RECORD, json.dumps(record, allow_nan=False, default=os.fspath))
    return info


def read_record(path: str | Path) -> dict[str, Any]:
    """The record that `to_pnginfo` put into a picture. Raises ImageError where there is none, or a damaged one."""
    text = _read_chunk(path, RECORD)
    if text is None:
        raise ImageError(f"{path} carries no record of its making; it must be a PNG of this project, metadata and all")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"the record in {path} is damaged: {error}") from error
    if not isinstance(record, dict):
        raise ImageError(f"the record in {path} is damaged: it must be a JSON object, got {type(record).__name__}")
    return record


def read_parameters(path: str | Path) -> dict[str, str]:
    """The `parameters` of a PNG of any tool, as `parse_parameters` gives them. Raises ImageError where it has none."""
    text = _read_chunk(path, PARAMETERS)
    if text is None:
        raise ImageError(f"{path} carries no generation parameters; it must be a PNG with its metadata in place")
    return parse_parameters(text)


def _read_chunk(path: str | Path, name: str) -> str | None:
    with open_image(path) as image:
        image.load()  # some tools write their text after the pixels
        text = image.info.get(name)
        return text if isinstance(text, str) else None


def _quote(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]|^\s|\s$', text) else text


def _unquote(value: str) -> str:
    if len(value) < 2 or not (value[0] == value[-1] == '"'):
        return value.strip()
    try:
        return json.loads(value)
    except ValueError:
        return value
