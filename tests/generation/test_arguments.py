"""The command line: the spellings and defaults of the original, and those that are ours."""

import runpy
from pathlib import Path

import pytest

from ldm.generation import arguments
from ldm.generation.options import ModelOptions, RunOptions
from ldm.generation.request import Request

ROOT = Path(__file__).parents[2]

# The options of the original's scripts, and what they are where the command line is silent. A default of None is
# read from the config, or settled by a sampler.
TXT2IMG = {
    "--prompt": "a painting of a virus monster playing guitar", "--outdir": "outputs/txt2img-samples",
    "--skip_grid": False, "--skip_save": False, "--ddim_steps": 50, "--laion400m": False, "--fixed_code": False,
    "--ddim_eta": 0.0, "--n_iter": 2, "--H": None, "--W": None, "--C": None, "--f": None, "--n_samples": 3,
    "--n_rows": 0, "--scale": 7.5, "--from-file": None, "--config": None,
    "--ckpt": "models/ldm/stable-diffusion-v1/model.ckpt", "--seed": 42, "--precision": "auto",
}  # fmt: skip
IMG2IMG = {key: value for key, value in TXT2IMG.items() if key not in ("--laion400m", "--H", "--W")} | {
    "--outdir": "outputs/img2img-samples", "--init-img": "a.png", "--strength": 0.75, "--scale": 5.0, "--n_iter": 1,
    "--n_samples": 2,
}  # fmt: skip
SAMPLE = {"-r": "model.ckpt", "-n": 8, "-e": 1.0, "-v": False, "-l": "outputs/diffusion-samples", "-c": 50,
          "--batch_size": 10}  # fmt: skip
DEST = {"--ddim_steps": "steps", "--ddim_eta": "eta", "--H": "height", "--W": "width", "--C": "channels",
        "--f": "factor", "--n_samples": "batch_size", "-r": "resume", "-n": "count", "-e": "eta",
        "-v": "vanilla_sample", "-l": "outdir", "-c": "steps"}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """A folder without settings of its own."""
    monkeypatch.chdir(tmp_path)


def parse(script: str, *options: str):
    return runpy.run_path(str(ROOT / f"scripts/{script}.py"))["parse"](list(options))


@pytest.mark.parametrize(
    ("script", "needed", "options"),
    [
        ("txt2img", [], TXT2IMG),
        ("img2img", ["--init-img", "a.png"], IMG2IMG),
        ("sample_diffusion", ["-r", "model.ckpt"], SAMPLE),
    ],
)
def test_the_options_of_the_original_are_there_with_their_defaults(script, needed, options):
    args = parse(script, *needed)
    for name, value in options.items():
        assert getattr(args, DEST.get(name, name.lstrip("-").replace("-", "_"))) == value, name


def test_without_a_flag_the_sampler_is_the_one_of_the_originals_readme():
    assert parse("txt2img").sampler == "plms"
    assert parse("txt2img", "--plms").sampler == "plms"
    assert parse("txt2img", "--dpm_solver").sampler == "dpm_solver"
    assert parse("img2img", "--init-img", "a.png").sampler == "ddim"
    assert parse("img2img", "--init-img", "a.png", "--plms").sampler == "plms"


@pytest.mark.parametrize("script", ["txt2img", "img2img", "inpaint", "sample_diffusion"])
def test_every_script_takes_what_is_new_alike(script):
    needed = {"img2img": "--init-img a", "inpaint": "--init-img a --mask b", "sample_diffusion": "-r a"}
    args = parse(script, *needed.get(script, "").split(), "--sampler", "euler", "--schedule", "karras",
                 "--device", "cpu", "--precision", "bf16",
                 "--seed_mode", "image", "--watermark", "off", "--safety", "off", "--offline")
    assert (args.sampler, args.schedule, args.device, args.precision) == ("euler", "karras", "cpu", "bf16")
    assert (args.seed_mode, args.watermark, args.safety, args.offline) == ("image", "", "off", True)


@pytest.mark.parametrize("options", [["--n-samples", "5"], ["--n_samples=5"], ["--n-samples=5"], ["--n_samples", "5"]])
def test_hyphens_and_underscores_are_one_in_the_names_of_options(options):
    assert parse("txt2img", *options).batch_size == 5


def test_what_looks_like_an_option_in_a_value_stays_as_it_is():
    args = parse("txt2img", "--prompt=--from-file and_so-on", "--outdir", "my_folder-2")
    assert (args.prompt, args.outdir) == ("--from-file and_so-on", "my_folder-2")


@pytest.mark.parametrize("spelled", ["--ddim_steps", "--steps", "--ddim-steps"])
def test_steps_have_the_name_of_the_original_and_a_short_one(spelled):
    assert parse("txt2img", spelled, "7").steps == 7


def test_wrong_usage_is_one_line_with_the_name_of_the_script(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["txt2img.py"])
    with pytest.raises(SystemExit) as end:
        parse("txt2img", "--steps", "many")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("txt2img.py: ")
    assert "'many'" in said


def test_a_watermark_is_a_text_or_off():
    assert parse("txt2img").watermark is RunOptions.watermark is None
    assert parse("txt2img", "--watermark", "mine").watermark == "mine"
    assert parse("txt2img", "--watermark", "off").watermark == ""


def test_laion400m_names_the_model_and_the_folder_of_the_original():
    args = parse("txt2img", "--laion400m")
    assert args.config == "configs/latent-diffusion/txt2img-1p4B-eval.yaml"
    assert args.ckpt == "models/ldm/text2img-large/model.ckpt"
    assert args.outdir == "outputs/txt2img-samples-laion400m"


def test_a_folder_of_pairs_has_a_model_of_its_own_unless_one_is_named():
    assert parse("inpaint", "--indir", "photos").ckpt == "models/ldm/inpainting_big/last.ckpt"
    assert parse("inpaint", "--indir", "photos", "--ckpt", "mine.ckpt").ckpt == "mine.ckpt"


def test_a_folder_is_searched_for_the_usual_names_of_a_checkpoint(tmp_path):
    (tmp_path / "logs/checkpoints").mkdir(parents=True)
    assert parse("sample_diffusion", "-r", "logs").ckpt == "logs"
    Path("logs/checkpoints/last.ckpt").touch()
    assert parse("sample_diffusion", "-r", "logs").ckpt == "logs/checkpoints/last.ckpt"
    Path("logs/model.ckpt").touch()
    assert parse("sample_diffusion", "-r", "logs").ckpt == "logs/model.ckpt"


def test_settings_are_picked_by_name_and_what_is_given_wins():
    args = parse("txt2img", "--scale", "3", "--W", "256", "--device", "cpu")
    request = arguments.pick(Request, args, prompt="a fox")
    assert (request.prompt, request.scale, request.width, request.height) == ("a fox", 3.0, 256, None)
    assert arguments.pick(ModelOptions, args).device == "cpu"
    assert arguments.pick(RunOptions, args).n_iter == 2


def test_the_defaults_of_the_options_are_those_of_the_dataclasses():
    args = parse("txt2img")
    assert arguments.pick(ModelOptions, args) == ModelOptions()
    assert arguments.pick(RunOptions, args, outdir=RunOptions.outdir, n_iter=RunOptions.n_iter) == RunOptions()
    assert arguments.pick(Request, args, prompt="") == Request()
