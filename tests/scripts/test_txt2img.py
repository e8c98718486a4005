"""scripts/txt2img.py, from the command line to the files."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.generation.request import LONG_PROMPTS, SAMPLERS, SCHEDULES
from ldm.image.io import read_image
from ldm.image.metadata import read_parameters, read_record
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.load import load_model

LONG = "a fox in the snow beside a river under old trees at the end of a day, " * 5 + "and a zebra"


@pytest.fixture
def txt2img(script, models):
    """Run it on the tiny text model in full precision on the CPU, in two steps, without a watermark."""

    def run(*options: object, kind: str = "text"):
        small = ("--ddim_steps", 2, "--watermark", "off", "--safety", "off", "--device", "cpu", "--precision", "full")
        return script("txt2img", "--ckpt", models[kind], *small, *options)

    return run


def pixels(path: str | Path) -> np.ndarray:
    return np.array(read_image(path))


def the_originals_loop(model, sampler, prompt: str, seed: int, n_iter: int, n_samples: int, steps: int, scale: float):
    """Pictures (h, w, 3), as scripts/txt2img.py of CompVis draws them, which seeds everything once."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for _ in range(n_iter):
            uc = model.get_learned_conditioning(n_samples * [""])
            c = model.get_learned_conditioning(n_samples * [prompt])
            samples, _ = sampler.sample(S=steps, conditioning=c, batch_size=n_samples, shape=[4, 16, 16], verbose=False,
                                        unconditional_guidance_scale=scale, unconditional_conditioning=uc, eta=0.0)
            decoded = torch.clamp((model.decode_first_stage(samples) + 1.0) / 2.0, min=0.0, max=1.0)
            for one in decoded:
                yield (255.0 * one.permute(1, 2, 0).numpy()).astype(np.uint8)


def test_the_command_writes_samples_and_a_grid_and_prints_nothing_but_their_paths(command, models, tmp_path):
    done = command("txt2img", "--prompt", "a fox", "--plms", "--ckpt", models["text"], "--ddim_steps", 2)
    assert done.returncode == 0
    outdir = Path("outputs/txt2img-samples")
    samples = [outdir / "samples" / f"{number:05}.png" for number in range(6)]
    assert done.stdout.splitlines() == [*map(str, samples), str(outdir / "grid-0000.png")]
    assert sorted(path.name for path in (tmp_path / outdir).rglob("*.png")) == [
        *(path.name for path in samples), "grid-0000.png"]
    # One line each for the checker and the watermark, which this size has no room for; and no bar without a terminal.
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["no safety checker", *2 * ["no watermark"]]


def test_what_is_drawn_twice_goes_on_from_the_highest_number(txt2img):
    options = ("--n_iter", 1, "--n_samples", 2)
    assert txt2img(*options).code == 0
    Path("outputs/txt2img-samples/samples/00007.png").touch()
    again = txt2img(*options)
    assert [Path(line).name for line in again.out] == ["00008.png", "00009.png", "grid-0001.png"]


@pytest.mark.parametrize(
    ("n_iter", "n_samples", "n_rows", "columns", "rows"), [(2, 3, 0, 3, 2), (1, 3, 2, 2, 2), (3, 1, 0, 1, 3)]
)
def test_the_grid_has_a_row_for_each_round_or_as_n_rows_says(txt2img, n_iter, n_samples, n_rows, columns, rows):
    done = txt2img("--n_iter", n_iter, "--n_samples", n_samples, "--n_rows", n_rows)
    *samples, grid = map(pixels, done.out)
    assert len(samples) == n_iter * n_samples
    assert grid.shape == (rows * 66 + 2, columns * 66 + 2, 3)
    for index, picture in enumerate(samples):
        top, left = (66 * place + 2 for place in divmod(index, columns))
        assert np.array_equal(grid[top:top + 64, left:left + 64], picture)


@pytest.mark.parametrize(("option", "wanted"), [("--skip_save", "grid-0000.png"), ("--skip_grid", "00000.png")])
def test_samples_and_grid_can_each_be_left_out(txt2img, option, wanted):
    done = txt2img("--n_iter", 1, "--n_samples", 1, option)
    assert [Path(line).name for line in done.out] == [wanted]
    assert [path.name for path in Path("outputs").rglob("*.png")] == [wanted]


@pytest.mark.parametrize(
    ("flag", "old", "steps"), [("--plms", PLMSSampler, 5), ("--dpm_solver", DPMSolverSampler, 5)]
)
def test_a_seed_gives_the_pictures_of_the_original_loop_through_every_batch(txt2img, models, flag, old, steps):
    done = txt2img("--prompt", "a fox", flag, "--seed", 7, "--scale", 5, "--ddim_steps", steps, "--skip_grid",
                   "--n_iter", 2, "--n_samples", 2)
    model = load_model(models["text"].with_name("config.yaml"), models["text"])
    wanted = list(the_originals_loop(model, old(model), "a fox", 7, 2, 2, steps, 5.0))
    assert len(done.out) == len(wanted) == 4
    for path, picture in zip(done.out, wanted):
        # One step of the 255 where rounding falls on the other side of a whole number.
        assert np.abs(pixels(path).astype(int) - picture).max() <= 1
    assert not np.array_equal(pixels(done.out[0]), pixels(done.out[2]))


def test_a_fixed_code_starts_every_round_alike(txt2img):
    done = txt2img("--fixed_code", "--n_iter", 2, "--n_samples", 2, "--skip_grid")
    first, second, third, fourth = map(pixels, done.out)
    assert np.array_equal(first, third)
    assert np.array_equal(second, fourth)
    assert not np.array_equal(first, second)


def test_a_fixed_code_serves_rows_of_several_sizes_and_the_last_of_them_is_made_again(txt2img):
    Path("rows.txt").write_text("a fox\na fox --W 32\na hare --W 32\na fox\na hare\n")
    done = txt2img("--from-file", "rows.txt", "--fixed_code", "--n_samples", 2, "--n_iter", 1, "--skip_grid")
    assert done.code == 0
    assert sorted(pixels(path).shape[1] for path in done.out) == [32, 32, 64, 64, 64]
    again = txt2img("--replay", done.out[-1], "--outdir", "again")
    assert Path(again.out[0]).read_bytes() == Path(done.out[-1]).read_bytes()


def test_a_seed_of_its_own_makes_a_picture_the_same_at_any_batch_size(txt2img):
    options = ("--seed_mode", "image", "--seed", 5, "--skip_grid", "--sampler", "euler_a")
    together = txt2img(*options, "--n_iter", 1, "--n_samples", 3)
    alone = txt2img(*options, "--n_iter", 3, "--n_samples", 1)
    for one, other in zip(together.out, alone.out, strict=True):
        assert np.abs(pixels(one).astype(int) - pixels(other)).max() <= 1
    single = txt2img(*options[:2], "--seed", 6, *options[4:], "--n_iter", 1, "--n_samples", 1)
    assert np.array_equal(pixels(single.out[0]), pixels(alone.out[1]))
    assert [read_record(path)["request"]["seed"] for path in alone.out] == [5, 6, 7]


def test_each_line_of_a_file_is_drawn_in_every_round_and_the_last_batch_may_be_short(txt2img):
    Path("prompts.txt").write_text("a fox\n\n  a hare\nein Mädchen\n", encoding="utf-8")
    done = txt2img("--from-file", "prompts.txt", "--n_iter", 2, "--n_samples", 2)
    *samples, grid = done.out
    prompts = [read_parameters(path)["Prompt"] for path in samples]
    assert prompts == 2 * ["a fox", "a hare", "ein Mädchen"]
    assert pixels(grid).shape == (3 * 66 + 2, 2 * 66 + 2, 3)


@pytest.mark.parametrize(
    ("option", "value", "recorded"),
    [("sampler", "heun", "heun"), ("plms", None, "plms"), ("dpm_solver", None, "dpm_solver")],
)
def test_the_sampler_is_named_as_an_option_or_by_a_flag_of_the_original(txt2img, option, value, recorded):
    done = txt2img(f"--{option}", *([value] if value else []), "--n_iter", 1, "--n_samples", 1, "--skip_grid")
    assert read_record(done.out[0])["request"]["sampler"] == recorded


def test_every_schedule_draws_another_picture(txt2img):
    options = ("--sampler", "euler", "--ddim_steps", 4, "--n_iter", 1, "--n_samples", 1, "--skip_grid")
    drawn = [txt2img(*options, "--schedule", schedule) for schedule in SCHEDULES]
    assert len({pixels(done.out[0]).tobytes() for done in drawn}) == len(SCHEDULES) == 4


def test_underscores_and_hyphens_spell_the_same_option(txt2img):
    one = txt2img("--n-samples", 1, "--n_iter=1", "--skip-grid", "--ddim-steps", 3, "--negative-prompt", "snow")
    other = txt2img("--n_samples", 1, "--n-iter=1", "--skip_grid", "--ddim_steps", 3, "--negative_prompt", "snow")
    assert one.code == other.code == 0
    assert Path(one.out[0]).read_bytes() == Path(other.out[0]).read_bytes()


def test_a_negative_prompt_changes_the_picture_only_where_there_is_guidance(txt2img):
    def drawn(negative, *options):
        one = ("--n_iter", 1, "--n_samples", 1, "--skip_grid")
        return pixels(txt2img(*one, *options, "--negative_prompt", negative).out[0])

    assert not np.array_equal(drawn(""), drawn("snow"))
    assert np.array_equal(drawn("", "--scale", 1), drawn("snow", "--scale", 1))


def test_the_end_of_a_long_prompt_is_cut_with_a_warning_that_quotes_it_or_read_in_chunks(txt2img):
    options = ("--n_iter", 1, "--n_samples", 1, "--skip_grid")
    cut = txt2img(*options, "--prompt", LONG, "--long_prompt", LONG_PROMPTS[0])
    assert "zebra" in cut.said
    lost = read_record(cut.out[0])["made"]["cut"]
    assert LONG.endswith(lost) and lost.endswith("zebra")
    same = txt2img(*options, "--prompt", LONG.replace("zebra", "horse"))
    assert np.array_equal(pixels(cut.out[0]), pixels(same.out[0]))
    whole = txt2img(*options, "--prompt", LONG, "--long_prompt", "chunk")
    other = txt2img(*options, "--prompt", LONG.replace("zebra", "horse"), "--long_prompt", "chunk")
    assert whole.err == []
    assert not np.array_equal(pixels(whole.out[0]), pixels(other.out[0]))


def test_the_size_is_the_models_own_or_that_of_H_and_W(txt2img):
    options = ("--n_iter", 1, "--n_samples", 1, "--skip_grid", "--C", 4, "--f", 4)
    assert pixels(txt2img(*options).out[0]).shape == (64, 64, 3)
    assert pixels(txt2img(*options, "--H", 32, "--W", 96).out[0]).shape == (32, 96, 3)


def test_every_precision_draws_on_a_processor(txt2img):
    options = ("--n_iter", 1, "--n_samples", 1, "--skip_grid", "--ddim_steps", 4)
    exact = txt2img(*options, "--precision", "full")
    for precision in ("auto", "bf16", "fp16", "autocast"):
        done = txt2img(*options, "--precision", precision)
        assert done.code == 0
        assert np.abs(pixels(done.out[0]).astype(float) - pixels(exact.out[0])).mean() < 4
        told = read_record(done.out[0])["run"]["precision"]
        assert told in ("full", "bf16") if precision == "auto" else told == precision


def test_the_averaged_weights_run_where_they_are_asked_for(txt2img, models, tmp_path):
    folder = tmp_path / "averaged"
    shutil.copytree(models["text"].parent, folder)
    file = torch.load(folder / "model.ckpt", weights_only=True)
    unet = {key: value for key, value in file["state_dict"].items() if key.startswith("model.")}
    file["state_dict"] |= {"model_ema." + key[6:].replace(".", ""): 1.1 * value for key, value in unet.items()}
    file["state_dict"] |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    torch.save(file, folder / "model.ckpt")
    options = ("--ckpt", folder / "model.ckpt", "--n_iter", 1, "--n_samples", 1, "--skip_grid")
    plain, averaged, silent = (txt2img(*options, *use) for use in (["--no-use_ema"], ["--use_ema"], []))
    assert plain.code == averaged.code == silent.code == 0
    assert not np.array_equal(pixels(plain.out[0]), pixels(averaged.out[0]))
    # The config keeps averages, unless it says `use_ema: False` as that of the tiny models does.
    assert np.array_equal(pixels(silent.out[0]), pixels(plain.out[0]))


def test_averaged_weights_that_are_not_there_are_an_error(txt2img):
    done = txt2img("--use_ema")
    assert (done.code, done.out) == (3, [])
    assert "has no EMA weights" in done.said


def test_offline_keeps_libraries_from_the_network(txt2img, monkeypatch):
    assert txt2img("--offline", "--n_iter", 1, "--n_samples", 1, "--skip_grid").code == 0
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(("options", "text"), [([], "StableDiffusionV1"), (["--watermark", "my mark"], "my mark")])
def test_a_watermark_is_found_by_the_script_that_looks_for_it(script, models, options, text):
    done = script("txt2img", "--ckpt", models["text"], "--ddim_steps", 1, "--n_iter", 1, "--n_samples", 1, "--scale", 1,
                  "--H", 256, "--W", 256, "--device", "cpu", "--safety", "off", *options)
    assert done.err == []
    found = script("check_watermark", "--text", text, *done.out)
    assert found.code == 0
    method = read_record(done.out[0])["made"]["watermark"]
    assert found.out[0].split("\t") == [done.out[0], text, method]


def test_no_watermark_is_written_where_it_is_off(script, txt2img):
    done = txt2img("--n_iter", 1, "--n_samples", 1, "--H", 256, "--W", 256, "--ddim_steps", 1, "--scale", 1)
    assert script("check_watermark", *done.out).code == 1


def test_a_safety_checker_without_weights_is_an_error_only_where_it_is_asked_for(txt2img, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    done = txt2img("--safety", "flag")
    assert (done.code, done.out) == (3, [])
    assert "safety-checker" in done.said
    assert "huggingface.co" in done.said
    runs = txt2img("--safety", "auto", "--n_iter", 1, "--n_samples", 1, "--skip_grid")
    assert (runs.code, len(runs.out)) == (0, 1)
    assert runs.said == "no safety checker: its weights are not at hand"


def test_the_metadata_say_how_a_picture_was_made(txt2img, models):
    done = txt2img("--prompt", "a fox, running", "--negative_prompt", "snow", "--sampler", "dpmpp_2m", "--schedule",
                   "karras", "--scale", 6.5, "--seed", 9, "--n_iter", 1, "--n_samples", 1, "--skip_grid")
    record = read_record(done.out[0])
    assert read_parameters(done.out[0]) == {
        "Prompt": "a fox, running", "Negative prompt": "snow", "Steps": "2", "Sampler": "DPM++ 2M Karras",
        "CFG scale": "6.5", "Seed": "9", "Size": "64x64", "Model hash": record["model"]["sha256"][:10],
        "Model": "model", "Version": f"ldm {record['versions']['ldm']}",
    }  # fmt: skip
    assert record["request"] | {"sampler": "dpmpp_2m", "seed": 9, "scale": 6.5, "steps": 2} == record["request"]
    run = {"device": "cpu", "precision": "full", "use_ema": None, "watermark": "", "safety": "off"}
    assert record["run"] | run == record["run"]
    assert record["model"]["checkpoint"] == "model.ckpt"
    assert record["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "options", [(), ("--fixed_code",), ("--seed_mode", "image"), ("--sampler", "ddim", "--ddim_eta", 1)]
)
def test_a_picture_of_a_later_batch_is_made_again_byte_for_byte(txt2img, options):
    first = txt2img("--n_iter", 2, "--n_samples", 2, "--prompt", "a fox", "--skip_grid", *options)
    again = txt2img("--replay", first.out[3], "--outdir", "again")
    assert again.out == ["again/samples/00000.png"]
    assert Path(again.out[0]).read_bytes() == Path(first.out[3]).read_bytes()


def test_a_replay_with_another_checkpoint_or_precision_says_that_it_will_differ(txt2img):
    first = txt2img("--n_iter", 1, "--n_samples", 1, "--skip_grid")
    other = txt2img("--replay", first.out[0], "--precision", "bf16", kind="v")
    assert other.code == 0
    assert "was made with model.ckpt" in other.err[0]
    assert "another checkpoint: the picture will differ" in other.err[1]
    assert other.err[2] == "the picture was made with precision 'full', not 'bf16': it may differ"


def test_a_model_that_predicts_v_draws_with_every_family_of_samplers(txt2img):
    for sampler in ("ddim", "dpm_solver", "euler"):
        assert txt2img("--sampler", sampler, "--n_iter", 1, "--n_samples", 1, "--skip_grid", kind="v").code == 0


def test_help_shows_every_sampler_and_default(script):
    done = script("txt2img", "--help")
    text = " ".join(" ".join(done.out).split())
    assert done.code == 0
    assert all(name in text for name in SAMPLERS)
    assert "denoising steps of any sampler (default: 50)" in text


def test_two_options_are_laid_out_in_a_grid_that_a_resume_finishes(txt2img):
    Path("rows.txt").write_text("a fox\na hare --seed 9\n")
    xy = ("--from-file", "rows.txt", "--xy", "steps=1,2", "sampler=euler,ddim", "--n_iter", 1, "--W", 64, "--H", 64)
    done = txt2img(*xy)
    assert (done.code, len(done.out)) == (0, 10)
    *samples, first, second = sorted(done.out, key=lambda path: ("grid" in path, path))
    records = [read_record(path)["request"] for path in samples]
    assert [(one["prompt"], one["sampler"], one["steps"], one["seed"]) for one in records] == [
        (prompt, sampler, steps, seed) for prompt, seed in (("a fox", 42), ("a hare", 9))
        for sampler in ("euler", "ddim") for steps in (1, 2)]
    shown = pixels(second)
    for number, path in enumerate(samples[4:]):
        x, y = 68 * (number % 2) - 136, 68 * (number // 2) - 136  # from the right and the bottom, where no text is
        cell = shown[y:y + 64 or None, x:x + 64 or None][:64, :64]
        assert np.array_equal(cell, pixels(path))
    whole = Path(second).read_bytes()
    Path(samples[6]).unlink()
    Path(second).unlink()
    assert sorted(txt2img(*xy, "--resume").out) == sorted([samples[6], first, second])
    assert Path(second).read_bytes() == whole
    alone = txt2img("--prompt", "a hare", "--seed", 9, "--seed_mode", "image", "--sampler", "ddim", "--ddim_steps", 2,
                    "--W", 64, "--H", 64, "--n_iter", 1, "--n_samples", 1, "--skip_grid")
    assert np.abs(pixels(alone.out[0]).astype(int) - pixels(samples[7])).max() <= 1  # it was in another batch


def test_safe_latent_diffusion_is_on_record_and_made_again_byte_for_byte(txt2img):
    settings = ("--safe", "500,1,0.2,0.5,0.7", "--safe_concept", "snow", "--n_iter", 2)
    first = txt2img("--prompt", "a fox", *settings)
    record = read_record(first.out[1])["request"]
    assert (record["safe"], record["safe_concept"]) == settings[1::2][:2]
    again = txt2img("--replay", first.out[1], "--outdir", "again")
    assert Path(again.out[0]).read_bytes() == Path(first.out[1]).read_bytes()
    assert "safe must be weak, medium, strong, max or five numbers" in txt2img("--safe", "hard").said
