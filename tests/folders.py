"""Folders in the layout of diffusers, of the parts of its pipelines."""

import json
from pathlib import Path

import torch
from support import assert_matches

from ldm.models.load import load_model


def save_folder(path: Path, parts: object, **schedulers) -> None:
    """Save each part that can be saved, and the index."""
    named = {name: part for name, part in (vars(parts) | schedulers).items() if hasattr(part, "save_pretrained")}
    for name, part in named.items():
        part.save_pretrained(path / name)
    (path / "model_index.json").write_text(json.dumps({
        name: [type(part).__module__.partition(".")[0], type(part).__name__] for name, part in named.items()}))


def assert_reads_as(folder: Path, model: torch.nn.Module) -> None:
    """Hold the model that a folder holds, built as its own JSON says, against the one that it was made of."""
    read = load_model(folder, folder)
    assert type(read) is type(model)
    want, got = model.state_dict(), read.state_dict()
    assert got.keys() == want.keys()
    for name in want:
        if "pretrained.model.head." in name:  # which a folder does not have
            assert not got[name].any()
        else:
            assert_matches(got[name], want[name], 1e-6)
    assert str(read.model.diffusion_model) == str(model.model.diffusion_model)
