"""Rows that are too large for the memory, under an allocator that counts what is alive and refuses what is too much."""

import weakref
from dataclasses import replace

import killing
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.generation.batch import Run
from ldm.generation.ledger import Ledger
from ldm.generation.noise import NoiseSource
from ldm.generation.rows import Row
from ldm.image.io import read_image
from ldm.image.metadata import read_record
from ldm.memory import SAVINGS, lowest
from ldm.modules.bands import set_band


class Allocator(TorchDispatchMode):
    """Raises torch.OutOfMemoryError where the tensors that are made inside it would take more than `most` bytes."""

    def __init__(self, most: float = float("inf")):
        super().__init__()
        self.most, self.peak, self.alive = most, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
                taken = sum(self.alive.values())
                self.peak = max(self.peak, taken)
                if taken > self.most:
                    raise torch.OutOfMemoryError(f"out of memory. Tried to allocate {storage.nbytes()} bytes")
        return made


class Confined:
    """A pipeline that has so much room for each batch, beside its weights."""

    def __init__(self, pipeline, room: float):
        self.pipeline, self.room = pipeline, room

    def __getattr__(self, name):
        return getattr(self.pipeline, name)

    def generate(self, *arguments):
        with Allocator(self.room):
            return self.pipeline.generate(*arguments)


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Run:
    return killing.open_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def thin(monkeypatch):
    """Bands so thin that they cut the layers of a tiny model."""
    monkeypatch.setitem(SAVINGS, "lowest", replace(SAVINGS["lowest"], band=2**14))
    before = set_band(SAVINGS["auto"].band)
    yield
    set_band(before)


def test_a_row_is_drawn_with_the_least_memory_before_it_fails_with_what_it_needed(opened, thin, tmp_path, caplog):
    small, large, larger = (replace(killing.SMALL, sampler="ddim", steps=1, width=side, height=side)
                            for side in (32, 64, 96))

    def peak(request):
        with Allocator() as allocator:
            opened.pipeline.generate([request], NoiseSource(torch.device("cpu")).of([request]))
        return allocator.peak

    usual = peak(large)
    with lowest(opened.pipeline.model, "auto"):
        least, least_of_larger = peak(large), peak(larger)
    room = (usual + least) / 2
    assert peak(small) < least < room < usual < least_of_larger

    opened.options = replace(opened.options, outdir=str(tmp_path), batch_size=2, n_iter=1)
    rows = [Row(request, f"line {n}") for n, request in enumerate((small, large, larger, large, small), 1)]
    opened.pipeline = Confined(opened.pipeline, room)
    summary = opened.draw(rows)
    assert (summary.made, summary.failed) == (4, 1)
    entries = next(iter(Ledger(tmp_path).read().values())).entries
    assert [entry.file for _, entry in sorted(entries.items())] == [
        "00000.png", "00001.png", None, "00003.png", "00004.png"]
    assert entries[2].error.startswith("not enough memory on cpu for a picture at 96x96 (the piece that did not fit")
    assert entries[2].error.endswith("make it smaller, or try --precision bf16")
    modes = [read_record(tmp_path / f"samples/0000{n}.png")["run"]["memory"] for n in (0, 1, 3, 4)]
    assert modes == ["auto", "lowest", "lowest", "auto"]
    assert read_image(tmp_path / "samples/00003.png").size == (64, 64)
    assert "a batch of 2 at 64x64" in caplog.text
