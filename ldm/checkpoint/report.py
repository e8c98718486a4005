"""What a weights file is and what is odd about it, told by its names, shapes and types; its numbers only if asked."""

import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint import Checkpoint, read_object
from ldm.checkpoint.archive import LEGACY_MAGIC
from ldm.checkpoint.diffusers import found
from ldm.checkpoint.families import CONTEXT, FIRST
from ldm.checkpoint.names import COMPUTED, rename, select_ema
from ldm.checkpoint.unpickle import StandIn

# The parts of a checkpoint by the first words of their names; the first that fits.
PARTS = [(re.compile(pattern), part) for pattern, part in (
    (r"model_ema\.(decay|num_updates)", "computed"), (r"model_ema\.", "EMA"), (COMPUTED.pattern, "computed"),
    (r"model\.", "UNet"), (r"control_model\.", "ControlNet"), (r"(first_stage_model\.)?loss\.", "training loss"),
    (r"first_stage_model\.|encoder\.|decoder\.|(post_)?quant_conv\.|quantize\.", "autoencoder"),
    (r"cond_stage_model\.|conditioner\.", "text encoder"), (r"depth_model\.", "depth estimator"),
    (r"embedder\.", "image encoder"), (r"low_scale_model\.|noise_augmentor\.", "noise augmentation"),
    (r"safety_checker\.", "safety checker"),
)]  # fmt: skip
BESIDE = ("EMA", "training loss", "computed", "safety checker")  # not counted as parameters of the model

# Names that belong to other layouts than ours.
FOREIGN = {
    "diffusers": re.compile(r"((unet|vae)\.)?(encoder\.|decoder\.)?(down_blocks|up_blocks|mid_block)\."),
    "LoRA": re.compile(r"lora_|.*\.lora_(up|down|A|B)\."),
    "transformers": re.compile(r"text_model\."),
}
# Blocks of which one has as many as the highest number says.
BLOCKS = re.compile(r"(?<![a-z_])(input_blocks|output_blocks|resblocks|layers|transformer_blocks)\.(?=\d)")

SHOWN = 3  # names that a line quotes
PICKED = 40  # letters of a value that a line quotes


@dataclass
class Report:
    """What can be said of one file or folder.

    dtypes: {type: number of weights}. parameters: {part: number}. beside: {name: what it is} of what is no weight.
    odd: sentences; broken: those that keep the model from running, which only `check` finds.
    """

    path: str
    form: str
    bytes: int
    family: str
    config: str | None
    script: str | None
    note: str
    weights: int
    parameters: dict[str, int]
    dtypes: dict[str, int]
    ema: bool
    beside: dict[str, str]
    odd: list[str]
    broken: list[str] = field(default_factory=list)
    sha256: str | None = None

    @property
    def total(self) -> int:
        """The parameters of the model itself: without averages, schedules and what only training uses."""
        return sum(count for part, count in self.parameters.items() if part not in BESIDE)


def inspect(checkpoint: Checkpoint) -> Report:
    """Describe an open checkpoint without reading its numbers."""
    outline, family, path = checkpoint.outline, checkpoint.family, checkpoint.path
    tree = {} if path.is_dir() else read_object(path)
    own = path if path.is_dir() else next(iter(path.parent.glob("config.yaml")), None)
    parts = Counter()
    for name, weight in outline.items():
        parts[part_of(name)] += weight.numel()
    return Report(
        path=str(path),
        form=form(checkpoint),
        bytes=size(checkpoint),
        family=family.name,
        config=str(own) if own else family.config,
        script=family.script,
        note="" if own else family.note,
        weights=len(outline),
        parameters=dict(parts.most_common()),
        dtypes=dict(Counter(str(weight.dtype).removeprefix("torch.") for weight in outline.values()).most_common()),
        ema=checkpoint.has_ema,
        beside=beside(tree),
        odd=[*oddities(checkpoint), *wasted(checkpoint, tree), *doubles(tree)],
    )


def part_of(name: str) -> str:
    return next((part for pattern, part in PARTS if pattern.match(name)), name.partition(".")[0])


def form(checkpoint: Checkpoint) -> str:
    """Which of the layouts on disk it is."""
    if checkpoint.path.is_dir():
        return "folder in the layout of diffusers"
    head = bytes(checkpoint.file.map[:64])
    if head.startswith(b"PK"):
        return "PyTorch"
    return "PyTorch (before 1.6)" if LEGACY_MAGIC.to_bytes(10, "little") in head else "safetensors"


def size(checkpoint: Checkpoint) -> int:
    files = checkpoint.file.files if checkpoint.path.is_dir() else [checkpoint.file]
    return sum(file.size for file in files)


# ------------------------------------------------------------------------------------------------- what is beside, odd

def beside(tree: Any) -> dict[str, str]:
    """What lies beside the state dict: numbers and words as they are, all else by name and size."""
    if not isinstance(tree, dict) or not isinstance(tree.get("state_dict"), dict):
        return {}
    return {str(name)[:PICKED]: describe(value) for name, value in tree.items() if name != "state_dict"}


def describe(value: Any) -> str:
    """One line on what training code left: its classes, and the bytes of tensors in it."""
    if isinstance(value, (str, int, float, type(None))):
        return repr(value) if len(repr(value)) <= PICKED else repr(value)[:PICKED] + "..."
    inside = list(walk(value))
    classes = sorted({item.name for item in inside if isinstance(item, StandIn)})
    held = sum(tensor.nbytes for tensor in inside if isinstance(tensor, Tensor))
    words = [", ".join(classes[:SHOWN]) + (" ..." if len(classes) > SHOWN else "")] if classes else []
    words += [f"{held:,} bytes of tensors"] if held else []
    return "; ".join(words) or f"a {type(value).__name__}"


def walk(value: Any) -> Iterator[Any]:
    """A value and everything in it, each object once: what a file holds may hold itself."""
    seen, waiting = set(), [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        match item:
            case dict():
                waiting += [*item.keys(), *item.values()]
            case list() | tuple() | set() | frozenset():
                waiting += item
            case StandIn():
                waiting += [item.arguments, item.state, item.items]


def oddities(checkpoint: Checkpoint) -> Iterator[str]:
    """What names, shapes and types show to be unusual."""
    outline, tell = checkpoint.outline, checkpoint.family.tell
    parts = {part_of(name) for name in outline}
    if FIRST in tell and "autoencoder" not in parts:
        yield "the autoencoder is missing (first_stage_model.*)"
    if CONTEXT in tell and "text encoder" not in parts:
        yield "the text encoder is missing (cond_stage_model.*)"
    for layout, pattern in FOREIGN.items() if FIRST in tell or not tell else ():
        names = [name for name in outline if pattern.match(name)]
        if names:
            yield f"{len(names):,} of {len(outline):,} weights are named as in {layout}: {some(names)}"
    for stem, missing in gaps(outline).items():
        yield f"the blocks {stem}* lack {', '.join(map(str, missing))}"
    if checkpoint.has_ema:
        yield from averages(outline)
    yield from types(checkpoint)


def averages(outline: Mapping[str, Tensor]) -> Iterator[str]:
    """Averaged weights and weights of the UNet that have no counterpart."""
    chosen = select_ema({name: name for name in outline})
    lonely = [name for name in outline if part_of(name) == "EMA" and name not in chosen.values()]
    plain = [name for name, source in chosen.items() if part_of(name) == "UNet" and name == source]
    if lonely:
        yield f"{len(lonely):,} averaged weights belong to none of the model: {some(lonely)}"
    if plain:
        yield f"{len(plain):,} weights of the UNet have no average: {some(plain)}"


def types(checkpoint: Checkpoint) -> Iterator[str]:
    """Weights of a type that no model has, and position ids that are not 0, 1, 2 ..."""
    wrong = [name for name, weight in checkpoint.outline.items()
             if not weight.is_floating_point() and part_of(name) != "computed"]
    if wrong:
        yield f"{len(wrong):,} weights are whole numbers: {some(wrong)}"
    for name, weight in checkpoint.outline.items():
        if name.endswith("position_ids"):
            ids = checkpoint.tensors[name].flatten()
            if weight.is_floating_point():
                yield f"{name} is {str(weight.dtype).removeprefix('torch.')} instead of int64"
            if ids.tolist() != list(range(len(ids))):
                yield f"{name} does not count from 0 to {len(ids) - 1}, as merging in half precision makes it"


def gaps(outline: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """{the first words of numbered blocks: the numbers below the highest that are missing}."""
    stems = {name[:match.end()] for name in outline for match in BLOCKS.finditer(name)}
    numbers = {stem: found(outline, re.escape(stem) + r"(\d+)\.") for stem in sorted(stems)}
    missing = {stem: sorted(set(range(max(present))) - present) for stem, present in numbers.items()}
    return {stem: absent for stem, absent in missing.items() if absent}


def wasted(checkpoint: Checkpoint, tree: Any) -> Iterator[str]:
    """Whether much of the file is none of its weights."""
    needed = sum(weight.nbytes for weight in checkpoint.outline.values())
    left = size(checkpoint) - needed
    if left > max(needed // 10, 16 << 20):
        held = sum(item.nbytes for item in walk(tree) if isinstance(item, Tensor)) - needed if tree else 0
        whose = "left over from training" if held > left // 2 else "used by nothing"
        yield f"{left:,} of its {size(checkpoint):,} bytes are {whose}: scripts/convert.py writes it without them"


def doubles(tree: Any) -> Iterator[str]:
    """Weights that are there under two names, of which one is read."""
    if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        tree = tree["state_dict"]
    names = [name for name in tree if isinstance(name, str)] if isinstance(tree, dict) else []
    ours = {name: next(iter(rename({name: name}))) for name in names}
    both = [name for name, our in ours.items() if our != name and our in ours]
    if both:
        yield f"{len(both):,} weights are there twice, with and without `text_model.`: {some(both)}"


# ------------------------------------------------------------------------------------------------ the numbers, if asked

def spoiled(checkpoint: Checkpoint) -> Iterator[str]:
    """What reading every number shows: weights that are not finite, or nothing but zeros."""
    wild, zero = [], []
    for name in checkpoint.tensors:
        weight = checkpoint.tensors[name]
        if weight.is_floating_point() and not weight.isfinite().all():
            wild.append(name)
        elif name.endswith(".weight") and weight.numel() > 1 and not weight.any():
            zero.append(name)
        checkpoint.release(weight)
    if wild:
        yield f"{len(wild):,} weights have numbers that are not finite: {some(wild)}"
    if zero:
        yield f"{len(zero):,} weights are nothing but zeros: {some(zero)}"


def altered(path: Path) -> Iterator[str]:
    """Whether the records of a file of torch.save are what they were when it was written, by their checksums."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        records = [name for name in archive.namelist() if "/data/" in name]
        wrong = [name for name in records if not intact(archive, name)]
    if wrong and len(wrong) < len(records):  # all: torch.serialization.set_crc32_options(False) writes none
        yield f"{len(wrong):,} of {len(records):,} records have changed since they were written ({some(wrong)}): " \
              "download it again"


def intact(archive: zipfile.ZipFile, name: str) -> bool:
    try:
        with archive.open(name) as record:
            while record.read(1 << 20):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def some(names) -> str:
    """The first of many names, as one line whatever a file calls them."""
    names = [name if name.isprintable() and len(name) <= 100 else repr(name[:100]) for name in names]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def lines(report: Report) -> Iterator[str]:
    """The report as text."""
    counts = {part: count for part, count in report.parameters.items() if count}
    rows = {
        "what": f"{report.family}, {report.form}, {report.bytes:,} bytes",
        "use": ", ".join(filter(None, (report.config, report.note, report.script))) or "no config here is for it",
        "precision": ", ".join(f"{kind} ({count:,} weights)" for kind, count in report.dtypes.items()),
        "parameters": f"{report.total:,}",
        **{f"  {part}": f"{count:,}" for part, count in counts.items() if part != "computed"},
        "EMA": "yes: --use_ema runs the averaged weights" if report.ema else "no",
    }
    if report.sha256:
        rows["sha256"] = f"{report.sha256} ({report.sha256[:10]})"
    yield report.path
    for name, text in rows.items():
        yield f"  {name:<18} {text}"
    for title, notes in (("beside", [f"{name}: {text}" for name, text in report.beside.items()]),
                         ("odd", report.odd), ("broken", report.broken)):
        for note in notes:
            yield f"  {title:<18} {note}"
