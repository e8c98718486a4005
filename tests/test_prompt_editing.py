import pytest

from ldm.prompt import merge_schedules, prompt_schedule


@pytest.mark.parametrize(("prompt", "schedule"), [
    ("a fox", [(0, "a fox")]),
    ("", [(0, "")]),
    ("a [fox:hare:0.4] runs", [(0, "a fox runs"), (4, "a hare runs")]),
    ("a fox[ in snow:.4]", [(0, "a fox"), (4, "a fox in snow")]),
    ("a fox[ in snow::0.4]", [(0, "a fox in snow"), (4, "a fox")]),
    ("[fox:hare: 3 ]", [(0, "fox"), (3, "hare")]),
    ("[fox:hare:1]", [(0, "fox"), (1, "hare")]),
    ("[fox:hare:0.25]", [(0, "fox"), (2, "hare")]),
    ("[fox:hare:0]", [(0, "hare")]),
    ("[fox:hare:10]", [(0, "fox")]),
    ("[fox:hare:99999999999999999999999]", [(0, "fox")]),
    ("[a:b:2] and [c:d:5]", [(0, "a and c"), (2, "b and c"), (5, "b and d")]),
    ("[a:b:5] and [c:d:5]", [(0, "a and c"), (5, "b and d")]),
    ("a [fox:[hare:owl:6]:3]", [(0, "a fox"), (3, "a hare"), (6, "a owl")]),
    ("[[fox:hare:6]:owl:3]", [(0, "fox"), (3, "owl")]),
])  # fmt: skip
def test_an_edit_changes_adds_or_removes_from_its_step_on(prompt, schedule):
    assert prompt_schedule(prompt, 10) == schedule


def test_a_share_of_the_steps_is_exact():
    assert prompt_schedule("[fox:hare:0.29]", 100)[1] == (29, "hare")


@pytest.mark.parametrize(("prompt", "schedule"), [
    ("a [fox|hare]", [(0, "a fox"), (1, "a hare"), (2, "a fox"), (3, "a hare")]),
    ("[a|b|c]", [(0, "a"), (1, "b"), (2, "c"), (3, "a")]),
    ("a[ fox|]", [(0, "a fox"), (1, "a"), (2, "a fox"), (3, "a")]),
    ("[[a|b]:c:2]", [(0, "a"), (1, "b"), (2, "c")]),
    ("[a|a]", [(0, "a")]),
])  # fmt: skip
def test_alternatives_take_turns(prompt, schedule):
    assert prompt_schedule(prompt, 4) == schedule


@pytest.mark.parametrize("prompt", [
    "a [fox] and (hare:1.3)",
    "[fox:hare]",
    "[fox:hare:soon]",
    "[fox:hare:-1]",
    "[a:b:c:0.5]",
    "[a|b:0.5]",
    "[0.5]",
    "[fox:hare:0.5",
    "fox:hare:0.5]",
    "(fox:hare:0.5)",
    "(a|b)",
    "((a][:b:c",
    r"\[fox:hare:0.5\]",
    r"[fox\:0.5]",
    "a fox\\",
])
def test_everything_else_is_left_for_the_weights(prompt):
    assert prompt_schedule(prompt, 10) == [(0, prompt)]


@pytest.mark.parametrize(("prompt", "schedule"), [
    ("[(fox:1.3):(hare):5]", [(0, "(fox:1.3)"), (5, "(hare)")]),
    ("(a [fox:hare:5]:1.3)", [(0, "(a fox:1.3)"), (5, "(a hare:1.3)")]),
    ("[[fox]:5]", [(0, ""), (5, "[fox]")]),
    (r"[fox\:\[:hare:5]", [(0, r"fox\:\["), (5, "hare")]),
    ("[(fox:hare:5]", [(0, "(fox"), (5, "hare")]),
])  # fmt: skip
def test_weights_and_escapes_inside_an_edit_stay_as_they_are(prompt, schedule):
    assert prompt_schedule(prompt, 10) == schedule


@pytest.mark.parametrize("steps", [0, 1])
def test_a_walk_of_no_step_has_a_text_too(steps):
    assert prompt_schedule("[fox:hare:0.5]", steps) == [(0, "hare")]


def test_several_schedules_become_one():
    schedules = [prompt_schedule(prompt, 10) for prompt in ("[a:b:3]", "c", "[d:e:5]")]
    assert dict(merge_schedules(schedules)) == {0: ("a", "c", "d"), 3: ("b", "c", "d"), 5: ("b", "c", "e")}
