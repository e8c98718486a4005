import pytest
import torch
from support import assert_matches, cases, golden
from torch import nn

from ldm.modules.ema import LitEma


@pytest.mark.parametrize("case", cases("ema"), ids=lambda case: case["name"])
def test_the_shadows_are_those_of_the_original(case):
    arrays, wanted = golden("inputs"), golden(case["file"])
    net = nn.Linear(5, 3)
    net.load_state_dict({"weight": arrays["w0"], "bias": arrays["b0"]})
    ema = LitEma(net, decay=case["params"]["decay"])
    steps = case["params"]["steps"]
    for k in range(1, steps + 1):
        net.load_state_dict({"weight": arrays["w0"] + k * arrays["dw"], "bias": arrays["b0"] - 0.1 * k})
        ema(net)
    for name in ("weight", "bias"):
        assert_matches(getattr(ema, name), wanted[f"{case['name']}/{name}_{steps}"])
    assert ema.num_updates == wanted[f"{case['name']}/num_updates"]


def test_buffers_are_named_like_the_parameters_without_their_dots():
    assert set(LitEma(nn.Sequential(nn.Linear(2, 2))).state_dict()) == {"decay", "num_updates", "0weight", "0bias"}


def test_frozen_parameters_have_no_shadow():
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    assert "bias" not in LitEma(net).state_dict()


def test_the_weights_come_back_after_a_look_at_their_average():
    net = nn.Linear(2, 2)
    ema = LitEma(net)
    shadow = net.weight.detach().clone()
    nn.init.ones_(net.weight)
    ema.store(net.parameters())
    ema.copy_to(net)
    assert torch.equal(net.weight, shadow)
    ema.restore(net.parameters())
    assert torch.equal(net.weight, torch.ones(2, 2))


def test_without_counting_updates_the_decay_is_constant():
    net = nn.Linear(1, 1)
    nn.init.zeros_(net.weight)
    ema = LitEma(net, decay=0.75, use_num_upates=False)
    nn.init.ones_(net.weight)
    ema(net)
    ema(net)
    assert ema.weight.item() == 1 - 0.75**2
    assert ema.num_updates == -1


def test_updates_can_be_counted_from_the_start_again():
    net = nn.Linear(1, 1)
    ema = LitEma(net)
    ema(net)
    ema.reset_num_updates()
    assert ema.num_updates == 0


def test_a_decay_outside_of_zero_to_one_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        LitEma(nn.Linear(1, 1), decay=1.5)
