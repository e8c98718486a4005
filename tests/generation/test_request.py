import dataclasses
import math

import pytest

from ldm import sampling
from ldm.errors import RequestError
from ldm.generation.request import ETA_SAMPLERS, SAMPLERS, SCHEDULES, Request, check_side


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "ddim_steps must be from 1 to 1000, got 0"),
        ({"steps": 1001}, "ddim_steps must be from 1 to 1000, got 1001"),
        ({"scale": math.nan}, "scale must be a finite number"),
        ({"scale": math.inf}, "scale must be a finite number"),
        ({"strength": -0.1}, "strength must be from 0.0 to 1.0"),
        ({"strength": 1.5}, "strength must be from 0.0 to 1.0"),
        ({"strength": math.nan}, "strength must be from 0.0 to 1.0"),
        ({"eta": 0.5, "sampler": "plms"}, "ddim_eta must be 0 with plms"),
        ({"eta": 2.0, "sampler": "ddim"}, "ddim_eta must be from 0.0 to 1.0"),
        ({"sampler": "magic"}, "sampler must be one of plms, ddim"),
        ({"schedule": "magic"}, "schedule must be one of default"),
        ({"seed_mode": "magic"}, "seed_mode must be one of run, image"),
        ({"seed": -1}, "seed must be from 0"),
        ({"prompt": "fox \udcff"}, r"prompt must be UTF-8, got 'fox \\udcff'"),
        ({"negative_prompt": "\ud800"}, "negative_prompt must be UTF-8"),
        ({"width": 0}, "width must be positive"),
        ({"height": -64}, "height must be positive"),
        ({"token_merging": 0.8}, "token_merging must be from 0.0 to 0.75, got 0.8"),
        ({"guidance_interval": "0.28"}, "two noise levels LO,HI such as 0.28,5.4, got '0.28'"),
        ({"guidance_interval": "0.28,x"}, "two noise levels LO,HI"),
        ({"guidance_interval": "5,1"}, "must rise from its LO"),
        ({"guidance_interval": "0,nan"}, "must rise from its LO"),
        ({"guidance_interval": "0.28,5.4", "safe": "weak"}, "leave guidance_interval out"),
        ({"mask": "mask.png"}, "a mask needs the picture"),
    ],
)
def test_a_request_rejects_what_cannot_be_drawn(wrong, message):
    with pytest.raises(RequestError, match=message):
        Request(**wrong)


def test_the_names_known_without_torch_are_those_of_the_samplers():
    assert set(SAMPLERS) == set(sampling.SAMPLERS)
    assert set(ETA_SAMPLERS) == {name for name, sampler in sampling.SAMPLERS.items() if sampler.takes_eta}
    assert SCHEDULES == sampling.SPACINGS


def test_a_request_survives_its_record():
    request = Request(prompt="a fox", sampler="ddim", eta=0.5, seed=7, class_label=3)
    assert Request.from_record(dataclasses.asdict(request)) == request


def test_a_record_with_settings_of_another_version_is_refused_by_name():
    with pytest.raises(RequestError, match="sharpness"):
        Request.from_record({"prompt": "a fox", "sharpness": 3})


@pytest.mark.parametrize(("value", "near"), [(500, 512), (-64, 64), (0, 64), (65, 64), (1000, 1024)])
def test_a_side_that_cannot_be_halved_evenly_names_the_nearest_that_can(value, near):
    with pytest.raises(RequestError, match=f"W must be a positive multiple of 64, got {value}; try {near}"):
        check_side("W", value, 64)
