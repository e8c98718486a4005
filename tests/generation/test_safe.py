"""Safe Latent Diffusion, from the word for its strength to the pixels."""

import logging

import numpy as np
import pytest

from ldm.errors import RequestError
from ldm.generation import stages
from ldm.generation.inputs import Given
from ldm.generation.request import Request
from ldm.generation.safe import CONCEPT, STRENGTHS, strength
from ldm.sampling import Away

SETTINGS = {"sampler": "euler", "steps": 4, "width": 32, "height": 32, "seed_mode": "image",
            "safe": "500,1,0.2,0.5,0.7"}


def differ(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


def test_a_strength_is_a_word_or_five_numbers():
    assert strength("max") == (5000, 0, 1, 0.5, 0.7)
    assert strength("1000, 10, .01, 0.3, 0.4") == STRENGTHS["medium"]
    assert isinstance(strength("1,2,3,4,1").warmup, int)
    Away(*strength("weak"))


@pytest.mark.parametrize(
    "text", ["hard", "", "1,2,3", "1,2,3,4,5,6", "1,2.5,3,4,0", "1,-2,3,4,0", "1,2,nan,4,0", "1,2,3,4,2"])
def test_what_is_no_strength_is_refused_with_what_is(text):
    with pytest.raises(RequestError, match=r"medium, strong, max or five numbers .* such as 1000,10,0.01,0.3,0.4"):
        Request(safe=text)


def test_a_row_is_the_same_alone_and_beside_others(draw):
    rows = [Request("a fox", seed=1, **SETTINGS), Request("two hares", "grey", seed=2, **SETTINGS)]
    together = draw("text", *rows)
    for row, picture in zip(rows, together):
        assert differ(draw("text", row)[0], picture) <= 1
        assert differ(draw("text", Request(**{**vars(row), "safe": None}))[0], picture) > 1


def test_the_concept_is_what_is_asked_for(draw, pipeline):
    ours, theirs = (draw("text", Request("a fox", **SETTINGS, **more))[0] for more in ({}, {"safe_concept": "a fox"}))
    assert differ(ours, theirs) > 1
    request = Request("a fox", safe="weak", scale=1.0)
    told = stages.condition(pipeline("text").model, [request], Given(), (4, 4), 3, None).roles
    for role, text in (("cond", "a fox"), ("uncond", ""), ("concept", CONCEPT)):
        assert (getattr(told, role) - pipeline("text").model.get_learned_conditioning([text])).abs().max() < 1e-6


def test_the_momentum_goes_on_where_the_prompt_changes(draw):
    plain, edited = (draw("text", Request(prompt, prompt_weights=True, **SETTINGS))[0]
                     for prompt in ("fox", "[fox:fox:0.5]"))
    assert differ(plain, edited) <= 1


@pytest.mark.parametrize("kind", ["v", "edit", "inpaint"])
def test_every_model_with_a_prompt_keeps_away(draw, kind, photo, mask):
    given = {"v": {}, "edit": {"init_img": photo, "image_scale": 1.5}, "inpaint": {"init_img": photo, "mask": mask}}
    settings = SETTINGS | given[kind]
    safe, plain = (draw(kind, Request("a fox", **{**settings, **more}))[0] for more in ({}, {"safe": None}))
    assert differ(safe, plain) > 1


def test_a_walk_that_ends_before_it_sets_in_says_so(draw, caplog):
    with caplog.at_level(logging.WARNING):
        plain, safe = (draw("text", Request("a fox", **{**SETTINGS, "safe": how}))[0] for how in (None, "weak"))
    assert differ(plain, safe) == 0
    assert caplog.messages == ["--safe weak begins after 15 evaluations of the network, but the walk had only 4: it "
                               "changed nothing"]


def test_a_model_without_prompts_has_no_concept_to_keep_away_from(pipeline):
    with pytest.raises(RequestError, match="leave --safe out"):
        stages.check(pipeline("unconditional").model, Request(safe="weak"))
