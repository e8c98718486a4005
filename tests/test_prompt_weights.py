import pytest

from ldm.prompt import parse_weights, plain_text

UP, DOWN = 1.1, 1 / 1.1


def read(prompt):
    return [(text, pytest.approx(weight)) for text, weight in parse_weights(prompt)]


@pytest.mark.parametrize(("prompt", "runs"), [
    ("a red fox", [("a red fox", 1)]),
    ("", [("", 1)]),
    ("a (red) fox", [("a ", 1), ("red", UP), (" fox", 1)]),
    ("a [red] fox", [("a ", 1), ("red", DOWN), (" fox", 1)]),
    ("a (red:1.3) fox", [("a ", 1), ("red", 1.3), (" fox", 1)]),
    ("(red: 1.3 )", [("red", 1.3)]),
    ("(red:.5)(fox:2.)(hill:3)", [("red", 0.5), ("fox", 2), ("hill", 3)]),
    ("(red:0)(fox:-1)(hill:+2)", [("red", 0), ("fox", -1), ("hill", 2)]),
    ("((red) fox)", [("red", UP**2), (" fox", UP)]),
    ("[[red]]", [("red", DOWN**2)]),
    ("((red:1.5) fox:2)", [("red", 3), (" fox", 2)]),
    ("([red])", [("red", 1)]),
    ("(a [red) fox]", [("a ", UP), ("red", 1), (" fox", DOWN)]),
    ("(a:b:1.3)", [("a:b", 1.3)]),
    ("(red)(fox)", [("redfox", UP)]),
    ("a (fox:1) on a hill", [("a fox on a hill", 1)]),
    ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).", [
        ("a ", 1), ("house", 1.3 * UP**2), (" ", UP), ("on", 1), (" a ", UP), ("hill", 0.5 * UP), (", sun, ", UP),
        ("sky", UP**4), (".", UP),
    ]),
])  # fmt: skip
def test_brackets_weigh_the_words_in_them(prompt, runs):
    assert read(prompt) == runs


@pytest.mark.parametrize(("prompt", "runs"), [
    (r"a \(red\) \[fox\]", [("a (red) [fox]", 1)]),
    (r"a (red \(1980\):1.2)", [("a ", 1), ("red (1980)", 1.2)]),
    (r"a\\b", [(r"a\b", 1)]),
    (r"\\(red)", [("\\", 1), ("red", UP)]),
    (r"(red\:1.3)", [("red:1.3", UP)]),
    ("a fox\\", [("a fox\\", 1)]),
])  # fmt: skip
def test_a_backslash_makes_the_next_character_text(prompt, runs):
    assert read(prompt) == runs


@pytest.mark.parametrize(("prompt", "runs"), [
    ("a) red] fox:1.3)", [("a) red] fox:1.3)", 1)]),
    ("a (red fox", [("a ", 1), ("red fox", UP)]),
    ("a [red (fox", [("a ", 1), ("red ", DOWN), ("fox", 1)]),
    ("(red:one) fox", [("red:one", UP), (" fox", 1)]),
    ("(red:1.2.3)", [("red:1.2.3", UP)]),
    ("a fox, 16:9", [("a fox, 16:9", 1)]),
    ("()[](:1.3)", [("", 1)]),
])  # fmt: skip
def test_what_is_no_pair_of_brackets_is_read_as_the_web_ui_reads_it(prompt, runs):
    assert read(prompt) == runs


def test_words_stay_apart_where_the_weight_changes():
    assert plain_text(parse_weights("a (foot:1.2)ball")) == "a  foot ball"
    assert plain_text(parse_weights("a football")) == "a football"
