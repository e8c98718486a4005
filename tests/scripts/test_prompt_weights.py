from PIL import Image

SMALL = ("--ddim_steps", 4, "--n_iter", 1, "--n_samples", 2, "--skip_grid", "--watermark", "off", "--H", 32, "--W", 32)
PROMPT = ("--prompt", "a [fox:(hare:1.5):2] on [snow]", "--negative_prompt", "(sun:1.2)")


def test_a_picture_whose_prompt_has_weights_and_edits_is_drawn_again_byte_for_byte(command, models, tmp_path):
    model = ("--ckpt", models["text"], "--device", "cpu")

    def second(outdir, *options):
        done = command("txt2img", *options, "--outdir", outdir, *model)
        assert done.returncode == 0, done.stderr
        return tmp_path / done.stdout.split()[-1]

    read = second("read", *PROMPT, "--prompt_weights", *SMALL)
    assert second("again", "--replay", read).read_bytes() == read.read_bytes()
    taken_as_text = second("text", *PROMPT, *SMALL)
    assert Image.open(taken_as_text).tobytes() != Image.open(read).tobytes()
