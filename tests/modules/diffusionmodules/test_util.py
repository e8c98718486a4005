import pytest
import torch
from support import assert_matches, cases, golden

from ldm.modules.diffusionmodules import util


@pytest.mark.parametrize("case", cases("betas"), ids=lambda case: case["name"])
def test_betas_and_timestep_embeddings_are_those_of_the_original(case):
    wanted, params = golden(case["file"]), case["params"]
    for name in params["schedules"]:
        betas = util.make_beta_schedule(name, params["n"], linear_start=params["start"], linear_end=params["end"])
        assert_matches(betas, wanted[f"{case['name']}/betas_{name}"], 1e-12)
    for dim in params["dims"]:
        got = util.timestep_embedding(torch.tensor(params["t"]), dim)
        assert_matches(got, wanted[f"{case['name']}/timestep_embedding_{dim}"], 1e-6)


def test_a_repeated_timestep_is_no_embedding():
    assert util.timestep_embedding(torch.tensor([1, 2]), 3, repeat_only=True).tolist() == [[1, 1, 1], [2, 2, 2]]


@pytest.mark.parametrize("flag", [True, False])
def test_checkpoint_gives_the_value_and_the_gradient(flag):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = util.checkpoint(lambda a, b: (a * b).sum(), (x, torch.tensor([3.0, 4.0])), (), flag)
    y.backward()
    assert y.item() == 11
    assert x.grad.tolist() == [3, 4]


def test_checkpoint_runs_the_function_again_only_where_asked():
    for flag, runs in ((True, 2), (False, 1)):
        calls = []
        x = torch.ones(1, requires_grad=True)
        util.checkpoint(lambda a, calls=calls: calls.append(1) or a.exp(), (x,), (), flag).backward()
        assert len(calls) == runs


def test_entries_of_a_schedule_broadcast_over_pictures():
    picked = util.extract_into_tensor(torch.arange(10.0), torch.tensor([3, 7]), (2, 3, 4, 4))
    assert picked.shape == (2, 1, 1, 1)
    assert picked.flatten().tolist() == [3, 7]


def test_noise_is_repeated_over_the_batch_if_asked():
    same = util.noise_like((3, 2, 4), "cpu", repeat=True)
    assert same.shape == (3, 2, 4)
    assert torch.equal(same[0], same[2])
    assert not torch.equal(*util.noise_like((2, 8), "cpu"))


def test_group_norm_of_half_precision_takes_its_statistics_in_float32():
    norm, x = util.normalization(64), 3 + torch.randn(2, 64, 32, 32)
    assert norm.eps == 1e-5
    assert_matches(norm.to(torch.bfloat16)(x.to(torch.bfloat16)).float(), norm.float()(x), 1e-2)


def test_a_zeroed_module_gives_zero():
    assert util.zero_module(util.conv_nd(2, 3, 4, 1))(torch.randn(1, 3, 2, 2)).abs().max() == 0


def test_the_average_pool_of_each_dimension_averages():
    for dims in (1, 2, 3):
        x = torch.arange(2.0**dims).reshape(1, 1, *(2,) * dims)
        assert util.avg_pool_nd(dims, 2)(x).item() == x.mean()
