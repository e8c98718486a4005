"""The adapters of a run: read before the model is, put into it, written down, and found again for a replay."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ldm.adapters.lora import Lora, merge_for_good, read_lora
from ldm.adapters.textual_inversion import Word, add_words, read_words
from ldm.checkpoint import checkpoint_hash
from ldm.errors import ImageError
from ldm.generation.options import ModelOptions, find, learned, weighted

logger = logging.getLogger(__name__)

KINDS = {"lora": "LoRA", "embedding": "embedding", "refiner": "refiner",
         "upscaler": "upscaler"}  # option -> what it names

# What a record says of one file: its name, its hash, and its weight or its words.
Entry = dict[str, Any]


@dataclass(frozen=True)
class Adapters:
    """What is added to a model, and how the record of a picture tells it: {option: entries}."""

    loras: tuple[Lora, ...]
    words: tuple[Word, ...]
    told: Mapping[str, list[Entry]]

    def put_into(self, model: nn.Module) -> None:
        """Raises CheckpointError where an adapter is for another model, RequestError where the model takes none."""
        if self.loras:
            merge_for_good(model, self.loras)
            for lora in self.loras:
                logger.info("%s: changes %d layers, at a weight of %g", lora.path, len(lora.layers), lora.weight)
        if self.words:
            add_words(model, self.words)


def read_adapters(options: ModelOptions) -> Adapters:
    """Read the files that --lora and --embedding name. Raises CheckpointError, RequestError."""
    told: dict[str, list[Entry]] = {kind: [] for kind in KINDS}
    loras, words = [], []
    for name, weight in map(weighted, options.lora):
        loras.append(read_lora(find(name), weight))
        told["lora"].append({"file": name, "sha256": checkpoint_hash(find(name)), "weight": weight})
    for name, text in map(learned, options.embedding):
        found = read_words(find(name), text)
        words += found
        told["embedding"].append(
            {"file": name, "sha256": checkpoint_hash(find(name)), "words": [word.text for word in found]})
    for kind, name in (("refiner", options.refiner), ("upscaler", options.upscaler)):
        if name:
            told[kind].append({"file": name, "sha256": checkpoint_hash(find(name))})
    return Adapters(tuple(loras), tuple(words), told)


def recall(recorded: Mapping[str, list[Entry]]) -> dict[str, tuple[str, ...] | str | None]:
    """The recorded adapters as the options that name them, without those whose files are not at hand as they were.

    Raises ImageError where the record is damaged.
    """
    try:
        for entry in (entry for kind in KINDS for entry in recorded[kind]):
            describe(entry)  # needs all of it
        found = {kind: tuple(spell(entry) for entry in recorded[kind] if at_hand(entry)) for kind in KINDS}
        return found | {kind: next(iter(found[kind]), None) for kind in ("refiner", "upscaler")}
    except (KeyError, TypeError, ValueError) as error:
        raise ImageError(f"the record of the picture's adapters is not complete: {error!r}") from error


def at_hand(entry: Entry) -> bool:
    path = find(entry["file"])
    return path.exists() and checkpoint_hash(path) == entry["sha256"]


def spell(entry: Entry) -> str:
    if "weight" in entry:
        return f"{entry['file']}:{entry['weight']}"
    return f"{entry['file']}:{entry['words'][0]}" if len(entry.get("words", ())) == 1 else entry["file"]


def differences(then: Mapping[str, list[Entry]], now: Mapping[str, list[Entry]]) -> Iterator[str]:
    """What a replay does without, and what it adds, in a sentence each; a file may have another name by now."""
    for kind, noun in KINDS.items():
        was, is_now = ([content(entry) for entry in entries[kind]] for entries in (then, now))
        for entry in then[kind]:
            if content(entry) not in is_now:
                yield (f"the picture was made with the {noun} {describe(entry)}, which is not at hand: it will differ; "
                       f"name the file with --{kind}")
        for entry in now[kind]:
            if content(entry) not in was:
                yield f"the picture was made without the {noun} {describe(entry)}: it will differ"


def content(entry: Entry) -> Entry:
    return {name: value for name, value in entry.items() if name != "file"}


def describe(entry: Entry) -> str:
    how = f"weight {float(entry['weight'])}, " if "weight" in entry else ""
    words = "".join(f"{word}, " for word in entry.get("words", ()))
    return f"{entry['file']} ({how}{words}sha256 {entry['sha256'][:10]})"
