"""Muon: the step of a matrix, and that all other weights are AdamW's."""

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from ldm.training.muon import Muon, all_orthogonal, is_matrix, orthogonal

SHAPES = (32, 96), (20, 20), (96, 32)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (64, 64)])
def test_all_singular_values_come_near_one_and_the_directions_stay(shape):
    matrix = drawn(*shape)
    made = orthogonal(matrix)
    assert made.dtype == matrix.dtype
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(made.flatten(), (left @ right).flatten(), dim=0) > 0.97


def test_a_step_of_a_matrix_has_the_asked_for_length_and_goes_down():
    weight = torch.nn.Parameter(drawn(32, 16, 3, 3))
    before, slope = weight.detach().clone(), drawn(32, 16, 3, 3)
    weight.grad = slope.clone()
    Muon([weight], lr=0.01, rms=0.5, weight_decay=0.0).step()
    moved = weight.detach() - before
    assert moved.square().mean().sqrt() == pytest.approx(0.01 * 0.5, rel=0.2)
    assert (moved * slope).sum() < 0


def test_vectors_and_narrow_matrices_move_as_with_adamw():
    shapes = (40,), (4, 32, 3, 3)
    weights = {kind: [torch.nn.Parameter(drawn(*shape)) for shape in shapes] for kind in ("ours", "torch")}
    optimizers = {"ours": Muon(weights["ours"], lr=0.01), "torch": torch.optim.AdamW(weights["torch"], lr=0.01)}
    for step in range(3):
        for kind, optimizer in optimizers.items():
            for weight in weights[kind]:
                assert not is_matrix(weight)
                weight.grad = drawn(*weight.shape) + step
            optimizer.step()
    for ours, theirs in zip(weights["ours"], weights["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_what_it_remembers_goes_into_a_checkpoint_and_comes_back():
    def run(steps: int, weight: torch.Tensor, state=None):
        weight = torch.nn.Parameter(weight.clone())
        optimizer = Muon([weight], lr=0.01)
        if state:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            optimizer.step(lambda: descend(optimizer, weight))
        return weight.detach(), optimizer.state_dict()

    def descend(optimizer, weight):
        optimizer.zero_grad()
        loss = (weight - 1).square().mean()
        loss.backward()
        return loss

    start = drawn(20, 20)
    whole, _ = run(4, start)
    half, state = run(2, start)
    torch.testing.assert_close(run(2, half, state)[0], whole, rtol=0, atol=0)
    assert (whole - 1).square().mean() < (start - 1).square().mean()


def share(rank: int, meeting: str, out: str) -> None:
    """Process number `rank` of two, which leaves what it ends up with in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.save(all_orthogonal([drawn(*shape) for shape in SHAPES]), f"{out}{rank}")
    dist.destroy_process_group()


def test_the_processes_of_a_run_share_the_work_and_end_up_with_the_same(tmp_path):
    multiprocessing.spawn(share, (str(tmp_path / "meeting"), str(tmp_path / "found")), nprocs=2)
    whole = all_orthogonal([drawn(*shape) for shape in SHAPES])
    for rank in (0, 1):
        found = torch.load(tmp_path / f"found{rank}")
        torch.testing.assert_close(found, whole, rtol=0, atol=0)
