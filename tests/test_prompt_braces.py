import pytest

from ldm.errors import RequestError
from ldm.prompt import expand_braces


@pytest.mark.parametrize(("text", "expanded"), [
    ("a fox, a hill", ["a fox, a hill"]),
    ("", [""]),
    ("a {red,blue} fox", ["a red fox", "a blue fox"]),
    ("{a,b} c {d,e}", ["a c d", "a c e", "b c d", "b c e"]),
    ("fox{, in snow,}", ["fox", "fox in snow", "fox"]),
    ("{,a}", ["", "a"]),
    ("{,}", ["", ""]),
    ("{a,{b,c}d,e}", ["a", "bd", "cd", "e"]),
    ("{{a,b} c,d}", ["a c", "b c", "d"]),
    ("({fox,hare}:1.{1,2})", ["(fox:1.1)", "(fox:1.2)", "(hare:1.1)", "(hare:1.2)"]),
    ("{fox,fox}", ["fox", "fox"]),
])  # fmt: skip
def test_braces_stand_for_their_combinations_in_order(text, expanded):
    assert expand_braces(text) == expanded


@pytest.mark.parametrize(("text", "expanded"), [
    (r"\{a,b\}", ["{a,b}"]),
    (r"{a\,b,c}", ["a,b", "c"]),
    (r"{\{,\}}", ["{", "}"]),
    (r"\({a,b}\)", [r"\(a\)", r"\(b\)"]),
    (r"\\{a,b}", [r"\\a", r"\\b"]),
    ("{a,b}\\", ["a\\", "b\\"]),
])  # fmt: skip
def test_a_backslash_makes_braces_and_commas_text_and_is_otherwise_kept(text, expanded):
    assert expand_braces(text) == expanded


@pytest.mark.parametrize(("text", "expanded"), [
    ("a {fox", ["a {fox"]),
    ("a fox}", ["a fox}"]),
    ("{fox}", ["{fox}"]),
    ("{}", ["{}"]),
    ("{a{b,c}}", ["{ab}", "{ac}"]),
    ("{a,b}}", ["a}", "b}"]),
    ("{a,{b,c}", ["{a,b", "{a,c"]),
    ("}a,b{", ["}a,b{"]),
])  # fmt: skip
def test_a_brace_without_its_other_half_or_a_choice_is_text(text, expanded):
    assert expand_braces(text) == expanded


def test_a_line_that_would_fill_the_memory_is_refused():
    assert len(expand_braces("{a,b}" * 16)) == 2**16
    with pytest.raises(RequestError, match="more than 100,000"):
        expand_braces("{a,b}" * 64)
