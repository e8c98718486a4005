"""Options from ldm.toml, the environment and the command line: who has the last word, and what is told of it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ldm.generation import arguments, settings
from ldm.generation.request import Request

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
DRAWING = ("txt2img", "img2img", "inpaint", "sample_diffusion")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Each test begins in a folder of its own, with nothing set."""
    monkeypatch.chdir(tmp_path)


def write(text: str) -> None:
    Path("ldm.toml").write_text(text, encoding="utf-8")


def parser() -> arguments.Parser:
    made = arguments.Parser(None, prog="txt2img.py")
    arguments.add_prompts(made, "a fox")
    arguments.add_sampling(made, sampler="plms", scale=7.5)
    arguments.add_size(made)
    arguments.add_model(made)
    arguments.add_output(made, "outputs", n_iter=2, batch_size=3)
    made.add_argument("--classes", type=lambda text: [int(one) for one in text.split(",")])
    return made


def parse(*words: str):
    return parser().parse_args(words)


def refusal(capsys, *words: str) -> str:
    """The one line of an error, after exit code 2."""
    with pytest.raises(SystemExit) as end:
        parse(*words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def script(name: str, *words: str) -> subprocess.CompletedProcess:
    line = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def test_each_place_has_the_word_over_those_before_it(monkeypatch):
    assert parse().steps == 50
    write("ddim_steps = 10")
    assert parse().steps == 10
    write("ddim_steps = 10\n[txt2img]\nddim_steps = 11\n[img2img]\nddim_steps = 12")
    assert parse().steps == 11
    monkeypatch.setenv("LDM_DDIM_STEPS", "20")
    assert parse().steps == 20
    assert parse("--ddim_steps", "30").steps == 30


def test_a_row_has_the_last_word(monkeypatch):
    from ldm.generation.rows import read_rows, row_parser

    monkeypatch.setenv("LDM_SCALE", "3")
    write("schedule = 'karras'")
    Path("prompts.txt").write_text("a hare\na fox --scale 5 --schedule trailing\n")
    first, second = read_rows("prompts.txt", row_parser(lambda made: arguments.add_sampling(
        made, sampler="plms", scale=7.5) or arguments.add_prompts(made, ""), parse()))
    assert (first.request.scale, first.request.schedule) == (3.0, "karras")
    assert (second.request.scale, second.request.schedule) == (5.0, "trailing")


@pytest.mark.parametrize("key", ["from-file", "from_file", "From-File"])
def test_keys_are_the_long_options_however_they_are_spelled(key):
    made = parser()
    arguments.add_rows(made)
    write(f'"{key}" = "prompts.txt"')
    assert made.parse_args([]).from_file == "prompts.txt"


@pytest.mark.parametrize(("line", "name", "value"), [
    ("steps = 7", "steps", 7), ("scale = 9", "scale", 9.0), ("H = 256", "height", 256),
    ("plms = true", "sampler", "plms"), ("dpm_solver = true", "sampler", "dpm_solver"),
    ("dpm_solver = false", "sampler", "plms"), ("skip_grid = true", "skip_grid", True),
    ("use_ema = false", "use_ema", False), ("quiet = true", "verbosity", -1), ("watermark = 'off'", "watermark", ""),
    ("lora = ['a b:0.5', 'c']", "lora", ("a b:0.5", "c")), ("lora = 'a b'", "lora", ("a b",)),
    ("classes = [207, 360]", "classes", [207, 360]), ("prompt = '100 % red'", "prompt", "100 % red"),
])  # fmt: skip
def test_a_value_of_the_file_is_what_the_command_line_would_make_of_it(line, name, value):
    write(line)
    assert getattr(parse(), name) == value


@pytest.mark.parametrize(("variable", "text", "name", "value"), [
    ("LDM_SEED", "7", "seed", 7), ("LDM_W", "256", "width", 256), ("LDM_SKIP_SAVE", "yes", "skip_save", True),
    ("LDM_USE_EMA", "off", "use_ema", False), ("LDM_LORA", "'a b:0.5' c", "lora", ("a b:0.5", "c")),
    ("LDM_NEGATIVE_PROMPT", "", "negative_prompt", ""),
])  # fmt: skip
def test_a_variable_is_what_the_command_line_would_make_of_it(monkeypatch, variable, text, name, value):
    monkeypatch.setenv(variable, text)
    assert getattr(parse(), name) == value


def test_the_command_line_takes_a_flag_back_and_replaces_a_list():
    write("skip_grid = true\nprompt_weights = true\nlora = ['a']")
    args = parse("--no-skip_grid", "--no_prompt_weights", "--lora", "b", "--lora", "c", "d")
    assert (args.skip_grid, args.prompt_weights, args.lora) == (False, False, ("b", "c", "d"))


@pytest.mark.parametrize(("text", "message"), [
    ("stepz = 7", "ldm.toml: there is no option 'stepz'; the nearest is 'steps'; what one script alone has goes under"),
    ("[txt2img]\nseeed = 7", "ldm.toml [txt2img]: there is no option 'seeed'; the nearest is 'seed'"),
    ("[txt2im]\nseed = 7", "no script 'txt2im' for a table [txt2im]; the nearest is [txt2img]"),
    ("[txt2img]\nstrength = 0.5", "there is no option 'strength'"),
    ("steps = 'many'", "ldm.toml: steps must be a whole number, got 'many'"),
    ("steps = 7.5", "steps must be a whole number, got 7.5"),
    ("steps = true", "steps must be one value, got True"),
    ("scale = 'much'", "scale must be a number, got 'much'"),
    ("sampler = 'magic'", "sampler must be one of plms, ddim"),
    ("solver_order = 4", "solver_order must be one of 2, 3, got 4"),
    ("skip_grid = 'perhaps'", "skip_grid must be true or false, got 'perhaps'"),
    ("prompt = 2026-01-01", "prompt must be one value"),
    ("steps = ", "ldm.toml is not valid TOML"),
])  # fmt: skip
def test_a_file_that_cannot_be_followed_says_what_would_work(capsys, text, message):
    write(text)
    assert message in refusal(capsys)


def test_a_variable_that_no_option_has_names_the_nearest(capsys, monkeypatch):
    monkeypatch.setenv("LDM_NEGATIV_PROMPT", "snow")
    assert "LDM_NEGATIV_PROMPT: there is no option" in (said := refusal(capsys))
    assert "LDM_NEGATIVE_PROMPT" in said


def test_a_variable_that_is_for_another_script_is_left_to_it(monkeypatch):
    for name in ("LDM_STRENGTH", "LDM_MASK", "LDM_VANILLA_SAMPLE", "LDM_CUSTOM_STEPS", "LDM_NO_HASH"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("LDM_SEED", "7")
    assert parse().seed == 7


def test_a_file_that_is_no_text_is_one_line(capsys):
    Path("ldm.toml").write_bytes(b"\xff\xfe")
    assert "not valid TOML" in refusal(capsys)
    Path("ldm.toml").unlink()
    Path("ldm.toml").mkdir()
    assert "cannot read ldm.toml" in refusal(capsys)


def test_what_only_other_scripts_have_is_no_mistake():
    write("strength = 0.5\n[img2img]\nnonsense = 1")
    assert not hasattr(parse(), "strength")


def test_every_option_declared_for_all_scripts_may_be_set_for_all():
    declared = {name for name in vars(arguments) if name.startswith("add_")}
    assert declared == {"add_prompts", "add_rows", "add_sampling", "add_size", "add_latents", "add_measures",
                        "add_model", "add_output", "add_picture", "add_refiner",
                        "add_replay", "add_upscaler"}, "add the new group to shared_options"
    assert arguments.shared_options() >= {"strength", "steps", "h", "c", "lora", "json", "replay", "from_file"}


def test_help_shows_the_default_that_holds(monkeypatch):
    write("ddim_steps = 12\nskip_grid = true")
    monkeypatch.setenv("LDM_SCALE", "3.25")
    shown = " ".join(parser().format_help().split())
    assert "of any sampler (default: 50)" in shown  # nothing is read before something is parsed
    run = script("txt2img", "--help")
    shown = " ".join(run.stdout.split())
    assert "of any sampler (default: 12)" in shown
    assert "write no grid (default: True)" in shown
    assert "more closely (default: 3.25)" in shown


@pytest.mark.parametrize("name", DRAWING)
def test_the_config_tells_where_each_setting_is_from_without_torch(monkeypatch, name):
    write("ddim_steps = 12\n[txt2img]\nn_iter = 9")
    monkeypatch.setenv("LDM_SEED", "7")
    code = (f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
            f"sys.argv = [{str(ROOT / 'scripts' / name)!r} + '.py', '--print_config', '--scale', '3']\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as end: assert not end.code\n"
            "assert 'torch' not in sys.modules")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    lines = [line.split("#") for line in run.stdout.splitlines()]
    told = {line[0].strip(): line[-1].strip() for line in lines if line[0]}
    steps = "custom_steps = 12" if name == "sample_diffusion" else "ddim_steps = 12"
    assert told[steps] == "ldm.toml"
    assert told["seed = 7"] == "LDM_SEED"
    assert told["scale = 3.0"] == "command line"
    assert told['schedule = "default"'] == "default"
    if name == "txt2img":
        assert told["n_iter = 9"] == "ldm.toml [txt2img]"


def test_sizes_come_from_the_yaml_of_the_model_and_shorthands_from_what_they_stand_for():
    config = ROOT / "configs/latent-diffusion/txt2img-1p4B-eval.yaml"
    shown = script("txt2img", "--laion400m", "--print_config").stdout
    assert "H = 256" in shown
    assert f"# model YAML, {config}" in shown
    assert "ckpt = \"models/ldm/text2img-large/model.ckpt\"" in shown
    assert "# what the others ask for" in shown


def test_what_is_told_is_itself_a_file_of_the_same_settings():
    words = ("--seed", "7", "--prompt", 'a "quoted" fox\n#1', "--skip_grid", "--lora", "a:0.5", "--dpm_solver", "-q")
    first = script("txt2img", *words, "--print_config").stdout
    assert tomllib.loads(first)["prompt"] == 'a "quoted" fox\n#1'
    write("[txt2img]\n" + first)
    again = script("txt2img", "--print_config").stdout
    assert tomllib.loads(again) == tomllib.loads(first)


def test_rows_tell_what_is_particular_to_them():
    Path("prompts.txt").write_text("a fox\na hare --seed 9 --ddim_steps 5\n")
    *_, first, second = script("txt2img", "--from-file", "prompts.txt", "--print_config").stdout.splitlines()
    assert first == '# prompts.txt, line 1: prompt = "a fox"'
    assert second == '# prompts.txt, line 2: prompt = "a hare", ddim_steps = 5, seed = 9'


def test_tools_have_settings_too():
    write("[convert]\nforce = true")
    run = script("convert", "a.ckpt", "b.ckpt", "--print_config")
    assert run.returncode == 0, run.stderr
    assert tomllib.loads(run.stdout)["force"] is True
    assert not Path("b.ckpt").exists()


def test_requests_are_made_of_what_is_set(monkeypatch):
    monkeypatch.setenv("LDM_SAMPLER", "ddim")
    monkeypatch.setenv("LDM_DDIM_ETA", "0.5")
    request = arguments.pick(Request, parse())
    assert (request.sampler, request.eta) == ("ddim", 0.5)


def test_a_word_of_an_option_is_known_by_every_spelling():
    assert {settings.spelling(name) for name in ("--From-File", "from_file", "FROM_FILE")} == {"from_file"}
