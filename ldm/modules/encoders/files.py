"""Folders in the transformers form, config.json, weights, vocabulary: read where they lie, never fetched."""

import json
from pathlib import Path

from torch import Tensor

from ldm.checkpoint import read_checkpoint
from ldm.errors import CheckpointError, ConfigError

# Where a model that a user has put beside the checkpoints is looked for, by the last part of its name.
MODELS = Path("models")
REPOSITORY = Path(__file__).resolve().parents[3]


def find_folder(path: str) -> Path | None:
    """The folder at a path that starts from the working folder, else from the repository; None where neither has it."""
    return next((folder for folder in (Path(path), REPOSITORY / path) if folder.is_dir()), None)


def local_folder(name: str, marks: tuple[str, ...]) -> Path | None:
    """The folder of a published model, "owner/model", that holds a file of `marks`; None where it is not at hand.

    It is looked for in models/<model>/, then in the cache that Hugging Face programs share on this machine.
    """
    beside = MODELS / name.rpartition("/")[2]
    if any((beside / mark).is_file() for mark in marks):
        return beside
    from huggingface_hub import try_to_load_from_cache

    paths = (try_to_load_from_cache(name, mark) for mark in marks)
    return next((Path(path).parent for path in paths if isinstance(path, str)), None)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def weights_of(folder: Path) -> Path | None:
    """The weights file of a folder: model.safetensors, else pytorch_model.bin; None where there is neither."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The state dict of a folder as views of a mapped file."""
    path = weights_of(folder)
    if path is None:
        raise CheckpointError(f"{folder} has none of {', '.join(WEIGHTS)}")
    return read_checkpoint(path)


def pick(found: dict[str, Tensor], wanted: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Copies of the weights that a module wants, in its dtype; `position_ids`, which are derived, may be absent.

    Raises CheckpointError that lists those which are missing or of another shape.
    """
    derived = {key: weight for key, weight in wanted.items() if key.endswith("position_ids")}
    found = {**found, **derived}
    wrong = [key for key, weight in wanted.items() if key not in found or found[key].shape != weight.shape]
    if wrong:
        raise CheckpointError(f"the weights in {source} lack, or have in another shape: {', '.join(sorted(wrong))}")
    return {key: found[key].to(weight.dtype, copy=True) for key, weight in wanted.items()}
