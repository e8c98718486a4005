"""What users get wrong: each mistake is one line that says what to do and an exit code, and nothing is half-written."""

import os
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.image.io import read_image

ONE = ("--ddim_steps", 2, "--n_iter", 1, "--n_samples", 1, "--skip_grid", "--watermark", "off", "--safety", "off",
       "--device", "cpu", "--precision", "full")
OVERFLOW = "the autoencoder overflowed in half precision: running it again in float32"


@pytest.fixture
def txt2img(script, models):
    return lambda *options: script("txt2img", "--ckpt", models["text"], *ONE, *options)


@pytest.fixture
def img2img(script, models):
    return lambda *options: script("img2img", "--ckpt", models["text"], *ONE, *options)


def check(outcome, code, *words):
    """A failure of the whole run: its code, one line with all the words, no path on stdout, no picture anywhere."""
    assert outcome.code == code, outcome
    assert outcome.out == []
    for word in words:
        assert word in outcome.said
    files = {path.name for path in Path("outputs").rglob("*") if path.is_file()}
    assert files <= {"manifest.jsonl"}  # which says why there is none


def damaged(models, folder: Path, change) -> Path:
    """The tiny text model with its weights changed by `change(state_dict)`, its config beside it."""
    shutil.copytree(models["text"].parent, folder)
    file = torch.load(folder / "model.ckpt", weights_only=True)
    change(file["state_dict"])
    torch.save(file, folder / "model.ckpt")
    return folder / "model.ckpt"


# ---- checkpoints


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda weights: b"", ["is empty", "download it again"]),
        (lambda weights: weights[:len(weights) // 2], ["cut short", "download it again"]),
        (lambda weights: b"<!DOCTYPE html><html>Please log in</html>", ["is a web page", "download the file itself"]),
        (lambda weights: b'{"error": "Unauthorized"}', ["not a checkpoint"]),
        (lambda weights: bytes(range(256)) * 20, ["not a checkpoint"]),
        (lambda weights: pickle.dumps({"state_dict": Attack()}), ["damaged.ckpt"]),
        (lambda weights: weights[:200] + bytes(400) + weights[600:], ["download it again"]),
    ],
    ids=["empty", "truncated", "html", "json", "other", "malicious pickle", "corrupt"],
)
def test_a_file_that_is_no_checkpoint_is_told_from_one(txt2img, models, content, words):
    Path("damaged.ckpt").write_bytes(content(models["text"].read_bytes()))
    config = models["text"].with_name("config.yaml")
    check(txt2img("--ckpt", "damaged.ckpt", "--config", config), 3, "damaged.ckpt", *words)
    assert not Path("attacked").exists()


def test_a_checkpoint_that_asks_to_run_code_is_refused_and_nothing_runs(txt2img, models):
    torch.save({"state_dict": {"weight": torch.ones(2)}, "callbacks": Attack()}, "attack.ckpt")
    check(txt2img("--ckpt", "attack.ckpt"), 3, "asks to run", "system", "nothing was run")
    assert not Path("attacked").exists()


def test_a_checkpoint_that_is_not_there_says_where_it_was_looked_for(txt2img, script, monkeypatch, tmp_path):
    check(txt2img("--ckpt", "nowhere.ckpt"), 3, "no checkpoint at nowhere.ckpt")
    check(script("txt2img", "--laion400m"), 3, "models/ldm/text2img-large/model.ckpt")
    monkeypatch.setattr("ldm.generation.options.REPOSITORY", tmp_path)  # where no model ships with the project
    check(script("txt2img"), 3, "models/ldm/stable-diffusion-v1/model.ckpt", "--ckpt FILE")


def test_a_checkpoint_of_another_family_names_its_own_config(txt2img, models):
    weights = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(320, 4, 3, 3, dtype=torch.float16),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(320, 1024),
    }
    torch.save({"state_dict": weights}, "sd2.ckpt")
    check(txt2img("--ckpt", "sd2.ckpt", "--config", models["text"].with_name("config.yaml")), 3,
          "Stable Diffusion 2", "use configs/stable-diffusion/v2-inference-v.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("first_stage_model.decoder.conv_out.bias"), ["missing", "decoder.conv_out.bias"]),
        (lambda state: state.update({"model.extra": torch.ones(1)}), ["unexpected", "model.extra"]),
        (lambda state: state.update({"model.diffusion_model.out.2.bias": torch.ones(7)}), ["of another shape", "(7,)"]),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_weights_that_do_not_fit_the_config_are_listed(txt2img, models, tmp_path, change, words):
    check(txt2img("--ckpt", damaged(models, tmp_path / "other", change)), 3, "does not fit", *words)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("txt2img", "inpaint", ["scripts/inpaint.py", "--init-img", "--mask"]),
        ("txt2img", "pairs", ["scripts/inpaint.py"]),
        ("txt2img", "unconditional", ["takes no prompt", "scripts/sample_diffusion.py"]),
        ("txt2img", "classes", ["scripts/sample_diffusion.py --classes"]),
        ("img2img", "inpaint", ["scripts/inpaint.py"]),
        ("inpaint", "pairs", ["takes no prompt", "leave --prompt out"]),
        ("sample_diffusion", "inpaint", ["scripts/inpaint.py"]),
        ("txt2img", "variation", ["scripts/variation.py"]),
        ("txt2img", "unclip", ["scripts/variation.py"]),
        ("img2img", "unclip", ["scripts/variation.py"]),
        ("variation", "text", ["scripts/img2img.py"]),
    ],
)
def test_a_model_given_to_the_wrong_script_names_the_right_one(script, models, photo, mask, name, kind, words):
    given = dict.fromkeys(("img2img", "variation"), ("--init-img", photo)) | {
        "inpaint": ("--prompt", "a fox", "--init-img", photo, "--mask", mask)}
    if name == "sample_diffusion":
        options = ("-r", models[kind], "--safety", "off", "--watermark", "off")
    else:
        options = ("--ckpt", models[kind], *ONE, *given.get(name, ()))
    check(script(name, *options), 2, *words)


# ---- configs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["no config at broken.yaml"]),
        ("model: [\n a: b: c", ["broken.yaml is not valid YAML", "line 2"]),
        ("", ["has no model section"]),
        ("- 1\n- 2\n", ["must be a YAML mapping"]),
        ("data: {}", ["has no model section"]),
        ("model: {target: ldm.models.autoencoder.AutoencoderKL}", ["does not describe a latent diffusion model"]),
    ],
)
def test_a_config_that_cannot_be_read_says_why(txt2img, text, words):
    if text is not None:
        Path("broken.yaml").write_text(text)
    check(txt2img("--config", "broken.yaml"), 3, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "ldm.models.diffusion.nothing.Model"}, ["unknown target", "ldm.models.diffusion.nothing"]),
        ({"params.unet_config.target": "ldm.modules.diffusionmodules.openaimodel.UNet"}, ["has no UNet"]),
        ({"params.unet_config.params.chanel_mult": [1, 2]}, ["chanel_mult"]),
    ],
)
def test_a_config_that_names_what_is_not_there_says_what(txt2img, models, changes, words):
    config = OmegaConf.load(models["text"].with_name("config.yaml"))
    for name, value in changes.items():
        OmegaConf.update(config.model, name, value, force_add=True)
    OmegaConf.save(config, "changed.yaml")
    check(txt2img("--config", "changed.yaml"), 3, *words)


# ---- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--W", 100], ["W must be a positive multiple of 16, got 100; try 96"]),
        (["--H", 0], ["height must be positive, got 0"]),
        (["--W", -64], ["width must be positive, got -64"]),
        (["--ddim_steps", 0], ["ddim_steps must be from 1 to 1000, got 0"]),
        (["--ddim_steps", 1001], ["ddim_steps must be from 1 to 1000, got 1001"]),
        (["--ddim_steps", "many"], ["--ddim_steps", "many"]),
        (["--scale", "nan"], ["scale must be a finite number, got nan"]),
        (["--scale", "inf"], ["scale must be a finite number, got inf"]),
        (["--plms", "--ddim_eta", 0.5], ["ddim_eta must be 0 with plms", "only ddim takes an eta"]),
        (["--sampler", "ddim", "--ddim_eta", 2], ["ddim_eta must be from 0.0 to 1.0"]),
        (["--sampler", "dpmpp"], ["invalid choice: 'dpmpp'", "dpmpp_2m"]),
        (["--prompt", "a fox \udcff"], ["prompt must be UTF-8"]),
        (["--seed", -1], ["seed must be from 0"]),
        (["--n_samples", 0], ["must be at least 1, got 0"]),
        (["--n_iter", 0], ["n_iter must be at least 1, got 0"]),
        (["--n_rows", -1], ["n_rows must be at least 0, got -1"]),
        (["--C", 3], ["C is 4 in this model, got 3"]),
        (["--f", 8], ["f is 4 in this model, got 8"]),
        (["--device", "gpu"], ["device must be auto, cpu, cuda", "'gpu'"]),
        (["--device", "cuda:99"], ["cuda:99 was asked for", "--device cpu"]),
        (["--frobnicate"], ["unrecognized arguments: --frobnicate", "--help"]),
        (["a fox"], ["unrecognized arguments: a fox"]),
        (["--prompt"], ["--prompt: expected one argument"]),
    ],
)
def test_an_option_out_of_range_is_wrong_usage(txt2img, options, words):
    check(txt2img(*options), 2, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_wrong_usage(txt2img):
    check(txt2img("--device", "cuda"), 2, "cuda was asked for", "finds none; try --device cpu")


def test_more_memory_than_there_is_exits_with_4(txt2img):
    done = txt2img("--W", 1_600_000, "--H", 1_600_000)
    first, last = done.err
    assert first.endswith("GB): trying with --memory lowest")
    check(done._replace(err=[last]), 4, "not enough memory on cpu for a picture at 1600000x1600000",
          "make it smaller", "2,560.00 GB")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["there is no prompt file prompts.txt"]),
        (b"", ["prompts.txt has no prompts in it"]),
        (b"\n  \n", ["prompts.txt has no prompts in it"]),
        (b"a fox\nM\xe4dchen\n", ["prompts.txt is not UTF-8 (line 2)"]),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_wrong_usage(txt2img, content, words):
    if content is not None:
        Path("prompts.txt").write_bytes(content)
    check(txt2img("--from-file", "prompts.txt"), 2, *words)


@pytest.mark.parametrize("ckpt", ["broken", "absent"])
def test_all_that_is_wrong_with_the_rows_is_told_before_the_weights_are_read(script, models, ckpt):
    Path("model").mkdir()
    if ckpt == "broken":
        shutil.copy(models["text"].with_name("config.yaml"), "model")
        Path("model/model.ckpt").write_bytes(b"no weights")
    Path("rows.txt").write_text("a --seed x\nb\nc --plms --ddim_eta 1\nd --H 100\n")
    done = script("txt2img", "--ckpt", "model/model.ckpt", *ONE, "--from-file", "rows.txt")
    assert done.code == 2
    found = [line.partition(": ")[0] for line in done.err]
    assert found == [f"rows.txt, line {n}" for n in ((1, 3, 4) if ckpt == "broken" else (1, 3))]


# ---- pictures


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["there is no picture at picture.png"]),
        (b"", ["the picture picture.png is empty"]),
        (b"hello", ["picture.png is not a picture in a known format"]),
        ("half", ["cannot read the picture picture.png"]),
        ("folder", ["picture.png is not a picture file"]),
    ],
)
@pytest.mark.parametrize("name", ["img2img", "inpaint"])
def test_a_picture_that_cannot_be_read_says_why(script, models, photo, mask, name, content, words):
    if content == "folder":
        Path("picture.png").mkdir()
    elif content is not None:
        Path("picture.png").write_bytes(photo.read_bytes()[:3000] if content == "half" else content)
    options = ("--init-img", "picture.png") if name == "img2img" else ("--init-img", photo, "--mask", "picture.png")
    check(script(name, "--ckpt", models["text"], *ONE, *options), 2, *words)


@pytest.mark.parametrize("strength", [-0.1, 1.5, "nan"])
def test_a_strength_that_is_no_part_of_1_is_wrong_usage(img2img, photo, strength):
    check(img2img("--init-img", photo, "--strength", strength), 2, "strength must be from 0.0 to 1.0")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("img2img", [], ["--init-img FILE"]),
        ("inpaint", [], ["--init-img FILE --mask FILE", "--indir DIR"]),
        ("inpaint", ["--init-img", "photo.png"], ["--mask FILE", "white is drawn anew"]),
        ("inpaint", ["--mask", "mask.png"], ["--init-img FILE --mask FILE"]),
        ("inpaint", ["--init-img", "photo.png", "--mask", "mask.png", "--indir", "."], ["or a folder"]),
        ("inpaint", ["--indir", "nowhere"], ["there is no folder nowhere"]),
        ("inpaint", ["--indir", "."], ["has no pair NAME.png, NAME_mask.png"]),
        ("inpaint", ["--indir", "photos", "--outdir", "photos/"], ["--outdir must be another folder than --indir"]),
        ("img2img", ["--replay", "photo.png"], ["photo.png carries no record of its making"]),
        ("img2img", ["--replay", "nowhere.png"], ["there is no picture at nowhere.png"]),
    ],
)
def test_what_a_script_starts_from_must_be_named(script, models, photo, mask, name, options, words):
    check(script(name, "--ckpt", models["text"], *ONE, *options), 2, *words)


# ---- where pictures go


@pytest.mark.parametrize("outdir", ["taken", "taken/inside"])
def test_an_output_folder_where_a_file_is_in_the_way_is_wrong_usage(txt2img, outdir):
    Path("taken").write_text("mine")
    check(txt2img("--outdir", outdir), 2, "a file is in the way", "--outdir")
    assert Path("taken").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a disk")
def test_an_output_folder_on_a_disk_that_is_read_only_is_wrong_usage(txt2img):
    Path("disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", "disk"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        check(txt2img("--outdir", "disk/out"), 2, "not allowed to write in disk/out (Read-only", "--outdir")
    finally:
        subprocess.run(["umount", "disk"], check=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_an_output_folder_without_permission_is_wrong_usage(txt2img):
    Path("locked").mkdir(mode=0o500)
    check(txt2img("--outdir", "locked/out"), 2, "not allowed to write", "--outdir")


def test_a_manifest_that_cannot_be_written_ends_the_run_before_a_picture_is(txt2img):
    Path("outputs/manifest.jsonl").mkdir(parents=True)
    check(txt2img("--outdir", "outputs"), 1, "outputs/manifest.jsonl: Is a directory")


def test_a_file_in_the_way_of_the_samples_is_wrong_usage(txt2img):
    Path("out").mkdir()
    Path("out/samples").touch()
    check(txt2img("--outdir", "out"), 2, "out/samples", "a file is in the way")


# ---- numbers


def test_latents_that_are_not_finite_make_no_picture(txt2img, models, tmp_path):
    def spoil(state):
        state["model.diffusion_model.out.2.weight"].fill_(float("nan"))

    done = txt2img("--ckpt", damaged(models, tmp_path / "nan", spoil), "--prompt", "a fox")
    check(done, 1, "'a fox': the latents are not finite", "--precision full", "the checkpoint is damaged")


@pytest.mark.parametrize("precision", ["full", "bf16", "autocast"])
def test_an_autoencoder_that_decodes_to_nothing_makes_no_picture(txt2img, models, tmp_path, precision):
    def spoil(state):
        state["first_stage_model.decoder.conv_out.bias"].fill_(float("nan"))

    done = txt2img("--ckpt", damaged(models, tmp_path / "nan", spoil), "--precision", precision)
    assert done.err[:-1] == ([] if precision == "full" else [OVERFLOW])
    check(done._replace(err=done.err[-1:]), 1, "the decoded picture is not finite", "may be damaged")


def test_an_autoencoder_that_overflows_in_half_precision_is_run_again_in_float32(txt2img, models, tmp_path):
    def enlarge(state):
        # Undone by the normalisation that follows, but over 65504 before it.
        for name in ("weight", "bias"):
            state[f"first_stage_model.decoder.conv_in.{name}"].mul_(1e5)

    big = damaged(models, tmp_path / "big", enlarge)
    half, full = (txt2img("--ckpt", big, "--precision", precision) for precision in ("fp16", "full"))
    assert (half.code, full.code) == (0, 0)
    assert half.said == OVERFLOW
    assert full.err == []
    one, other = (np.asarray(read_image(done.out[0]), dtype=float) for done in (half, full))
    assert one.std() > 1
    assert np.abs(one - other).mean() < 4


def test_a_picture_of_one_pixel_is_enough_to_start_from(img2img):
    Image.new("RGB", (1, 1), "red").save("dot.png")
    assert img2img("--init-img", "dot.png").code == 0
