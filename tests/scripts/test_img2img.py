"""scripts/img2img.py, from the command line to the files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.image.io import read_image, to_array
from ldm.image.metadata import read_parameters, read_record
from ldm.models.load import load_model

SMALL = ("--ddim_steps", 4, "--n_samples", 1, "--skip_grid", "--watermark", "off", "--safety", "off", "--device", "cpu",
         "--precision", "full")


@pytest.fixture
def img2img(script, models):
    """Run it on the tiny text model in full precision on the CPU, in four steps, for one picture."""

    def run(*options: object):
        return script("img2img", "--ckpt", models["text"], *SMALL, *options)

    return run


def pixels(path: str | Path) -> np.ndarray:
    return np.array(read_image(path))


def test_the_command_draws_from_a_picture(command, models, photo, tmp_path):
    done = command("img2img", "--prompt", "A fantasy landscape", "--init-img", photo, "--strength", 0.8,
                   "--ckpt", models["text"], "--ddim_steps", 3, "--watermark", "off")
    assert done.returncode == 0, done.stderr
    outdir = "outputs/img2img-samples"
    assert done.stdout.splitlines() == [f"{outdir}/samples/00000.png", f"{outdir}/samples/00001.png",
                                        f"{outdir}/grid-0000.png"]
    first, second, grid = (tmp_path / line for line in done.stdout.splitlines())
    assert not np.array_equal(pixels(first), pixels(second))
    assert pixels(grid).shape == (68, 134, 3)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver", "euler_a"])
def test_strength_0_is_a_round_trip_through_the_autoencoder(img2img, models, photo, sampler):
    done = img2img("--init-img", photo, "--strength", 0, "--sampler", sampler)
    model = load_model(models["text"].with_name("config.yaml"), models["text"])
    image = torch.from_numpy(to_array(read_image(photo))).permute(2, 0, 1)[None]
    with torch.no_grad():
        there = model.get_first_stage_encoding(model.encode_first_stage(image).mode())
        back = model.decode_first_stage(there)[0].permute(1, 2, 0)
    wanted = (255 * ((back + 1) / 2).clamp(0, 1)).numpy().astype(np.uint8)
    assert np.abs(pixels(done.out[0]).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("sampler", ["plms", "heun"])
def test_strength_1_forgets_the_picture(img2img, script, models, photo, sampler):
    Image.new("RGB", (64, 64), "navy").save("other.png")
    options = ("--prompt", "a fox", "--sampler", sampler, "--scale", 7.5)
    one, other = (img2img("--init-img", path, "--strength", 1, *options) for path in (photo, "other.png"))
    from_noise = script("txt2img", "--ckpt", models["text"], *SMALL, "--n_iter", 1, *options)
    assert np.array_equal(pixels(one.out[0]), pixels(other.out[0]))
    assert np.array_equal(pixels(one.out[0]), pixels(from_noise.out[0]))


def test_less_strength_stays_nearer_to_the_picture(img2img, photo):
    round_trip, near, far = (pixels(img2img("--init-img", photo, "--strength", strength, "--ddim_steps", 10).out[0])
                             for strength in (0, 0.1, 0.9))
    assert 0 < np.abs(near.astype(int) - round_trip).mean() < np.abs(far.astype(int) - round_trip).mean()


def test_a_picture_is_turned_upright_and_what_is_transparent_becomes_white(img2img):
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste("red", (0, 0, 16, 16))
    upright.save("upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its left side: turned a quarter clockwise to be shown
    upright.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    seen_through = upright.convert("RGBA")
    seen_through.putpixel((40, 20), (0, 0, 0, 0))
    seen_through.save("clear.png")
    plain, turned, clear = (img2img("--init-img", name, "--strength", 0.3)
                            for name in ("upright.png", "turned.png", "clear.png"))
    with Image.open("turned.png") as lying:
        assert lying.size == (32, 64)
    assert plain.err == turned.err == clear.err == []
    assert np.array_equal(pixels(plain.out[0]), pixels(turned.out[0]))
    assert np.array_equal(pixels(plain.out[0]), pixels(clear.out[0]))


@pytest.mark.parametrize(
    ("size", "options", "drawn"),
    [
        ((70, 50), (), (64, 48)),
        ((1, 1), (), (16, 16)),
        ((64, 64), ("--W", 32), (32, 64)),
        ((30, 30), ("--H", 48, "--W", 32), (32, 48)),
    ],
)
def test_a_picture_of_an_odd_size_is_resized_with_a_notice(img2img, size, options, drawn):
    Image.new("RGB", size, "teal").save("odd.png")
    done = img2img("--init-img", "odd.png", *options, "--n_iter", 2)
    assert done.said == "odd.png is resized from {}x{} to {}x{}".format(*size, *drawn)
    assert [read_image(path).size for path in done.out] == [drawn, drawn]


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "1", "LA", "I;16"])
def test_a_picture_of_any_mode_can_be_started_from(img2img, mode):
    grey = np.arange(64 * 64).reshape(64, 64)
    name = "picture.tiff" if mode == "CMYK" else "picture.png"
    if mode == "I;16":
        Image.fromarray((grey * 15).astype(np.uint16)).save(name)
    else:
        Image.fromarray((grey // 16).astype(np.uint8)).convert(mode).save(name)
    done = img2img("--init-img", name, "--strength", 0.2)
    assert (done.code, done.err) == (0, [])
    assert pixels(done.out[0]).std() > 1


def test_the_metadata_name_the_picture_and_its_strength(img2img, photo):
    done = img2img("--init-img", photo, "--strength", 0.5)
    assert read_parameters(done.out[0])["Denoising strength"] == "0.5"
    request = read_record(done.out[0])["request"]
    assert (request["init_img"], request["strength"], request["sampler"]) == (str(photo), 0.5, "ddim")


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_sde"])
def test_a_picture_is_made_again_byte_for_byte(img2img, photo, sampler):
    first = img2img("--init-img", photo, "--prompt", "a fox", "--sampler", sampler, "--n_iter", 2)
    again = img2img("--replay", first.out[1], "--outdir", "again")
    assert Path(again.out[0]).read_bytes() == Path(first.out[1]).read_bytes()


def test_each_line_of_a_file_is_drawn_from_the_one_picture(img2img, photo):
    Path("prompts.txt").write_text("a fox\na hare\na stag\n")
    done = img2img("--init-img", photo, "--from-file", "prompts.txt", "--n_samples", 2)
    assert [read_parameters(path)["Prompt"] for path in done.out] == ["a fox", "a hare", "a stag"]
