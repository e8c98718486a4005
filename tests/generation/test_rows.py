"""The rows of a file: what they may say, and how their mistakes are told."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest

from ldm.errors import RequestError
from ldm.generation import arguments
from ldm.generation.axes import read_axes
from ldm.generation.request import Request
from ldm.generation.rows import Row, check_rows, read_rows, row_parser, spread


def add_request(parser: arguments.Parser) -> None:
    arguments.add_prompts(parser, "a default")
    arguments.add_picture(parser, strength=0.75)
    arguments.add_sampling(parser, sampler="plms", scale=7.5)
    arguments.add_size(parser)


@pytest.fixture
def read(tmp_path):
    """Read the text of a file of that name, with the options of a command line."""

    def run(text: str | bytes, *options: str, name: str = "rows.txt", needs=()) -> list[Row]:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        rows = read_rows(path, parser(*options, needs=needs))
        check_rows(rows)
        return rows

    return run


def parser(*options: str, needs=()):
    command_line = arguments.Parser(None)
    add_request(command_line)
    return row_parser(add_request, command_line.parse_args(list(options), Namespace(outdir="x", from_file="y")), needs)


def prompts(rows: list[Row]) -> list[str]:
    return [row.request.prompt for row in rows]


def test_the_lines_that_are_not_blank_are_prompts(read):
    text = "\ufeffa fox\r\n\r\n   \nein Mädchen \n東京\nit's o'clock, \"quoted\" -- and -v\n"
    rows = read(text)
    assert prompts(rows) == ["a fox", "ein Mädchen", "東京", "it's o'clock, \"quoted\" -- and -v"]
    assert [row.place.partition(", ")[2] for row in rows] == ["line 1", "line 4", "line 5", "line 6"]


def test_options_behind_a_prompt_are_its_own_and_the_others_those_of_the_command_line(read):
    first, second = read(
        'a castle at dusk, it\'s late --seed 7 --scale 9 --negative-prompt "people, cars" --H 128\na fox\n',
        "--scale", "3", "--ddim_steps", "9", "--seed", "5",
    )  # fmt: skip
    assert (first.request.prompt, first.request.negative_prompt) == ("a castle at dusk, it's late", "people, cars")
    assert (first.request.seed, first.request.scale, first.request.height, first.request.steps) == (7, 9.0, 128, 9)
    assert (second.request.seed, second.request.scale, second.request.height, second.request.steps) == (5, 3.0, None, 9)
    assert (first.seeded, second.seeded) == (True, False)


def test_the_keys_of_json_and_the_columns_of_csv_are_long_options(read):
    values = {"prompt": "a fox, running", "seed": 7, "scale": 9.5, "plms": None, "fixed_code": True, "sampler": "ddim"}
    of_json = read(json.dumps(values) + "\n" + json.dumps({"prompt": "", "ddim-steps": 3}) + "\n", name="rows.jsonl")
    of_csv = read('prompt,seed,scale,fixed_code,sampler\n"a fox, running",7,9.5,TRUE,ddim\na hare,,,,\n',
                  name="rows.CSV")
    assert of_json[0].request == of_csv[0].request
    assert of_json[1].request.prompt == ""
    assert of_json[1].request.steps == 3
    assert of_csv[1].request == read("a hare")[0].request


def test_false_takes_back_a_flag_of_the_command_line(read):
    row, = read('{"prompt": "a fox", "prompt_weights": false}', "--prompt_weights", name="rows.jsonl")
    assert row.request.prompt_weights is False


def test_the_number_of_a_row_is_that_of_its_first_line(read):
    rows = read('prompt,seed\n"two\nlines",1\na fox,2\n', name="rows.csv")
    assert prompts(rows) == ["two\nlines", "a fox"]
    assert [row.place[-6:] for row in rows] == ["line 2", "line 4"]


def test_braces_stand_for_several_rows(read):
    assert prompts(read("a {red,blue} fox --seed 3\nplain\n")) == ["a red fox", "a blue fox", "plain"]
    assert prompts(read('{"prompt": "{a,b}"}', name="rows.jsonl")) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a fox --ar 16:9", "unrecognized arguments: --ar 16:9"),
        ("a fox --seed seven", "invalid int value: 'seven'"),
        ("a fox --seed 7 in the snow", "unrecognized arguments: in the snow"),
        ("a fox --negative_prompt \"people", "No closing quotation"),
        ("a fox --scale", "expected one argument"),
        ("a fox --sampler magic", "invalid choice: 'magic'"),
        ("a fox --outdir elsewhere", "unrecognized arguments: --outdir elsewhere"),
        ("a fox --ddim_steps 0", "ddim_steps must be from 1 to 1000, got 0"),
        ("a fox --ddim_eta 0.5", "ddim_eta must be 0 with plms"),
    ],
)  # fmt: skip
def test_a_line_that_does_not_parse_is_an_error_with_its_number(read, line, message):
    with pytest.raises(RequestError, match=message) as error:
        read(f"fine\n\n{line}\n")
    assert "rows.txt, line 3: " in str(error.value)


def test_all_errors_are_told_together(read):
    with pytest.raises(RequestError) as error:
        read("a --seed x\nfine\nb --scale nan\nc --seed -1\n")
    assert [line.partition(": ")[0].rpartition(" ")[2] for line in str(error.value).splitlines()] == ["1", "3", "4"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", "{]", "line 1: Expecting"),
        ("rows.jsonl", '["a fox"]', "a row must be a JSON object, got list"),
        ("rows.jsonl", '{"prompt": ["a"]}', "prompt must be one value"),
        ("rows.jsonl", '{"prompt": "a", "seeds": true}', "unrecognized arguments: --seeds"),
        ("rows.jsonl", '{"steps": true}', "expected one argument"),
        ("rows.csv", "prompt,seed\na,b,1\n", "more cells than there are columns"),
        ("rows.txt", " \n\n", "has no prompts"),
        ("rows.txt", b"fine\n\xff\n", r"not UTF-8 \(line 2\)"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(read, name, text, message):
    with pytest.raises(RequestError, match=message):
        read(text, name=name)


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(RequestError, match="there is no prompt file"):
        read_rows(tmp_path / "absent.txt", parser())
    with pytest.raises(RequestError, match="cannot read the prompt file"):
        read_rows(tmp_path, parser())


def test_what_a_script_cannot_do_without_may_be_given_in_either_place(read):
    assert [row.request.init_img for row in read("a\nb --init_img b.png", "--init-img", "a.png", needs=["init_img"])] \
        == ["a.png", "b.png"]
    with pytest.raises(RequestError, match="line 1: --init-img FILE is missing"):
        read("a\nb --init-img b.png", needs=["init_img"])


def test_what_no_model_and_what_this_one_cannot_draw_is_told_together(tmp_path, pipeline):
    lines = ["a --H 100", "b", "c --init_img absent.png", "d --sampler ddim --ddim_eta 2", "{e,f} --long_prompt chunk",
             "g --schedule spread", "h --strength 1.5 --init_img x.png", "i --ddim_steps 1001", "j --plms --ddim_eta 1"]
    (tmp_path / "rows.txt").write_text("\n".join(lines))
    with pytest.raises(RequestError) as error:
        check_rows(read_rows(tmp_path / "rows.txt", parser()), pipeline("text").check)
    said = [line.partition("rows.txt, line ")[2] for line in str(error.value).splitlines()]
    assert [line.partition(": ")[0] for line in said] == ["1", "3", "4", "6", "7", "8", "9"]
    assert "H must be a positive multiple of 16, got 100" in said[0]
    assert "there is no picture at absent.png" in said[1]
    with pytest.raises(RequestError, match="line 2: this model takes no prompt"):
        check_rows(read_rows(tmp_path / "rows.txt", parser()), pipeline("unconditional").check)


FOX = Row(Request(prompt="a fox", seed=3))


def cells(*axes: str, row: Row = FOX) -> list[Row]:
    return spread(row, read_axes(axes), add_request)


def test_two_options_are_spread_row_by_row_from_one_noise_and_the_rest_is_the_rows_own():
    spread_out = cells("steps=10,20,50", "scale=3,7.5", row=Row(Request(prompt="a fox", seed=3), "line 7"))
    assert [(row.request.scale, row.request.steps) for row in spread_out] == [
        (3, 10), (3, 20), (3, 50), (7.5, 10), (7.5, 20), (7.5, 50)]
    assert {replace(row.request, scale=0, steps=1) for row in spread_out} == {
        Request(prompt="a fox", seed=3, seed_mode="image", scale=0, steps=1)}
    assert {(row.seeded, row.place) for row in spread_out} == {(True, "line 7")}


def test_the_values_of_an_axis_are_those_of_a_csv():
    assert prompts(cells('prompt="a, b", c ,true')) == ["a, b", "c ", "true"]
    assert [row.request.prompt_weights for row in cells("prompt-weights=true,False")] == [True, False]
    assert [row.request.negative_prompt for row in cells("negative_prompt=,people")] == ["", "people"]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["steps"], "takes one or two of OPTION=VALUE,VALUE, .* got 'steps'"),
        (["steps= "], "got 'steps= '"),
        (["=3"], "got '=3'"),
        (["steps=3", "scale=2", "seed=1"], "got 3"),
        (["steps=3", "steps=4"], "got steps twice"),
        (["stepz=3"], "no option 'stepz' that a row may have; the nearest is 'steps'"),
        (["steps=3,many"], "--xy, steps=many: .*invalid int value: 'many'"),
        (["ddim_eta=0,1", "sampler=ddim,plms"], "--xy, ddim_eta=1 sampler=plms: ddim_eta must be 0 with plms"),
    ],
)
def test_axes_that_cannot_be_laid_out_say_why(axes, message):
    with pytest.raises(RequestError, match=message):
        check_rows(cells(*axes))
