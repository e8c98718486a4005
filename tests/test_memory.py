"""A picture drawn with less memory is the same picture, and what waits off the device is there when it is needed."""

import platform
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import KINDS, write_model
from torch import nn

from ldm import memory
from ldm.config import load_config, model_section
from ldm.errors import OutOfMemory
from ldm.generation.geometry import geometry
from ldm.generation.noise import NoiseSource
from ldm.generation.pipeline import Pipeline
from ldm.generation.request import Request
from ldm.memory import SAVINGS, Saving, as_out_of_memory, free_memory, lowest, pick_memory, place, wait
from ldm.models.load import load_model
from ldm.modules.attention_ops import set_attention
from ldm.modules.bands import set_band

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def as_before():
    """What holds for the whole process is put back after each test."""
    band, attention = set_band(1), set_attention("sdpa")
    set_band(band)
    yield
    set_band(band)
    set_attention(attention)


@pytest.fixture
def small(monkeypatch):
    """Savings that cut even the layers of a tiny model."""
    monkeypatch.setattr(memory, "LARGE", 1)
    for name, entries in (("low", 4096), ("lowest", 1024)):
        monkeypatch.setitem(SAVINGS, name, replace(SAVINGS[name], band=entries))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function that loads the tiny model of a kind afresh."""
    root = tmp_path_factory.mktemp("models")
    paths = {}

    def load(kind, **options):
        if kind not in paths:
            paths[kind] = write_model(root / kind, kind)
        return load_model(paths[kind].with_name("config.yaml"), paths[kind], **options)

    load.config = lambda kind: model_section(load_config(root / kind / "config.yaml"))
    return load


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A picture and the mask of its left half."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(folder / "mask.png")
    return {"init_img": str(folder / "photo.png"), "mask": str(folder / "mask.png")}


# What each kind of script asks for: text, a picture, the part of one, pairs with a VQ autoencoder, nothing, classes.
SCRIPTS = {
    "txt2img": ("text", {"prompt": "a fox", "scale": 3.0}, ()),
    "txt2img, v": ("v", {"prompt": "a fox", "scale": 3.0}, ()),
    "img2img": ("text", {"prompt": "a fox", "scale": 3.0, "strength": 0.5}, ("init_img",)),
    "inpaint, any model": ("text", {"prompt": "a fox", "scale": 3.0}, ("init_img", "mask")),
    "inpaint": ("inpaint", {"prompt": "a fox", "scale": 3.0}, ("init_img", "mask")),
    "inpaint --indir": ("pairs", {"scale": 1.0}, ("init_img", "mask")),
    "sample_diffusion": ("unconditional", {"scale": 1.0}, ()),
    "sample_diffusion --classes": ("classes", {"class_label": 3, "scale": 2.0}, ()),
}


def draw(model, section, request):
    drawn = Pipeline(model, geometry(section)).generate([request], NoiseSource(CPU).of([request]))
    return np.asarray(drawn[0].image, dtype=np.float32)


@pytest.fixture(scope="module")
def usual(models, files):
    """A function that gives the request of a script, and its picture as `auto` draws it."""

    @cache
    def pair(script):
        kind, asked, named = SCRIPTS[script]
        request = Request(sampler="ddim", steps=2, **asked, **{name: files[name] for name in named})
        return request, draw(place(models(kind), CPU), models.config(kind), request)

    return pair


@pytest.mark.parametrize("mode", ["low", "lowest"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_less_memory_gives_the_same_picture_in_every_script(script, mode, models, usual, small):
    kind, (request, picture) = SCRIPTS[script][0], usual(script)
    model = place(models(kind, mapped=mode == "lowest"), CPU, mode)
    assert wait(model, CPU, SAVINGS[mode])  # as on a device, where main memory is elsewhere
    assert np.abs(draw(model, models.config(kind), request) - picture).max() <= 1  # of 255: rounding


def devices(module):
    return {weight.device.type for weight in module.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_waits_is_in_main_memory_and_the_rest_on_the_device(kind, models, small):
    model = place(models(kind), META, "low")
    assert devices(model.model) == {"meta"}
    assert "cpu" in devices(model.first_stage_model.decoder)
    assert model.device.type == "meta"
    model = place(models(kind), META, "lowest")
    assert "cpu" in devices(model.model.diffusion_model.output_blocks)
    assert devices(model.model.diffusion_model.time_embed) == {"meta"}
    assert model.device.type == "meta"
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}


def test_texts_go_where_their_encoder_runs(models, small):
    model = place(models("text"), META, "low")
    assert "cpu" in devices(model.cond_stage_model)
    assert model.cond_stage_model.device.type == "meta"
    assert model.get_learned_conditioning(["a fox"]).device.type == "meta"


def test_a_weight_that_waits_is_on_the_device_only_while_its_layer_runs(models, small):
    model = place(models("text"), META, "lowest")
    layer = model.model.diffusion_model.middle_block[0].in_layers[2]
    seen = []
    layer.register_forward_pre_hook(lambda layer, inputs: seen.append(layer.weight.device.type))
    home = layer.weight
    unet = model.model.diffusion_model
    x, t, context = torch.empty(1, 4, 8, 8), torch.empty(1), torch.empty(1, 5, 64)
    assert unet(x.to(META), t.to(META), context.to(META)).device.type == "meta"
    assert seen == ["meta"]
    assert layer.weight is home


def test_a_weight_goes_home_from_a_layer_that_fails(models, small):
    model = place(models("text"), META, "lowest")
    layer = model.model.diffusion_model.middle_block[0].in_layers[2]
    home = layer.weight
    with pytest.raises(RuntimeError):
        layer(torch.empty(1, 3, 8, 8, device=META))
    assert layer.weight is home


def test_layers_that_use_their_weights_without_running_stay_on_the_device(small):
    class Odd(nn.Linear):
        pass

    stage = nn.Module()
    stage.encoder, stage.decoder = nn.Linear(4, 4), Odd(4, 4)
    stage.quantize = nn.Embedding(4, 4)
    model = nn.Module()
    model.first_stage_model = stage
    place(model, META, "low")
    assert [weight.device.type for weight in (stage.encoder.weight, stage.decoder.weight, stage.quantize.weight)] == [
        "cpu", "meta", "meta"]  # fmt: skip


def test_a_weight_waits_once_however_often_it_is_asked_to(models, small):
    model = models("text")
    for mode in ("low", "lowest", "lowest"):
        wait(model, CPU, SAVINGS[mode])
    counts = {
        sum(isinstance(hook, memory.Visit) for hook in layer._forward_pre_hooks.values()) for layer in model.modules()
    }
    assert counts == {0, 1}


def test_a_picture_that_proved_too_large_is_drawn_with_the_lowest_and_the_next_one_as_before(models, usual, small):
    request, picture = usual("txt2img")
    model, config = place(models("text"), CPU), models.config("text")
    before = draw(model, config, request)
    with lowest(model, "auto"):
        assert set_band(SAVINGS["lowest"].band) == SAVINGS["lowest"].band
        meagre = draw(model, config, request)
    assert np.abs(meagre - picture).max() <= 1
    assert np.array_equal(meagre, draw(place(models("text"), CPU, "lowest"), config, request))
    place(model, CPU)
    assert np.array_equal(draw(model, config, request), before)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"), "fit is of 21.47 GB)"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB). Tried to allocate 256 MB"), "is of 268.44 MB)"),
        (RuntimeError("can't allocate memory: you tried to allocate 4000000000 bytes."), "4.00 GB)"),
        (MemoryError(), "too wide"),
    ],
)
def test_every_backends_way_of_saying_that_memory_is_short_is_one_with_what_was_asked_for(error, said):
    with pytest.raises(OutOfMemory) as caught, as_out_of_memory("too wide"):
        raise error
    assert str(caught.value).startswith("too wide")
    assert str(caught.value).endswith(said)
    with pytest.raises(RuntimeError, match="shapes"), as_out_of_memory("too wide"):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize(("left", "picked"), [(4 << 30, "auto"), (2 << 30, "low"), (1 << 20, "lowest"), (-5, "lowest")])
def test_auto_takes_what_the_free_memory_asks_for(left, picked, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: (8 << 30) + left)
    assert pick_memory("auto", CPU, 8 << 30) == picked
    assert pick_memory("low", CPU, 8 << 30) == "low"


def test_the_free_memory_of_this_machine_is_known():
    assert 1 << 24 < free_memory(CPU) < 1 << 60


def test_each_mode_gives_up_no_less_than_the_one_before():
    modes = [SAVINGS[name] for name in ("auto", "low", "lowest")]
    assert modes[0] == Saving(2**26)
    for more, less in pairwise(modes):
        assert less.band < more.band
        assert less.stages >= more.stages and less.network >= more.network


def test_mapped_weights_stay_in_the_file_and_others_do_not(models):
    weight = "model.diffusion_model.out.2.weight"
    mapped, copied, cast = (
        dict(models("text", mapped=mapped, dtype=dtype).named_parameters())[weight]
        for mapped, dtype in ((True, torch.float32), (False, torch.float32), (True, torch.bfloat16))
    )
    assert in_a_file(mapped)
    assert not in_a_file(copied)
    assert not in_a_file(cast)


def in_a_file(weight):
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            start, end = (int(edge, 16) for edge in line.split()[0].split("-"))
            if start <= weight.data_ptr() < end:
                return line.rstrip().endswith(".ckpt")
    return False


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_memory_that_tensors_leave_is_there_for_the_next_ones():
    # In a process of its own, for what is settled holds to its end. The first touch of a page is a fault.
    program = """
import resource, torch
from ldm.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (1 << 24, 1 << 22, 3 << 22, 1 << 23):
        torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

handed_back = faults() + faults()
keep_freed_memory()
print(handed_back, sum(faults() for _ in range(4)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    handed_back, kept = map(int, done.stdout.split())
    assert kept < handed_back
