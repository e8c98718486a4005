import pytest
import torch

from ldm.generation.noise import Noise, NoiseSource
from ldm.generation.request import Request

CPU = torch.device("cpu")


def test_a_run_draws_what_torch_draws_from_its_seed():
    like = torch.empty(3, 4, 8, 8)
    noise = NoiseSource(CPU).of([Request(seed=42)])
    torch.manual_seed(42)
    assert torch.equal(noise.start(like), torch.randn(3, 4, 8, 8))
    assert torch.equal(noise(like), torch.randn(3, 4, 8, 8))


def test_the_generator_of_a_run_goes_on_from_batch_to_batch():
    source, like = NoiseSource(CPU), torch.empty(2, 4, 8, 8)
    first, second = source.of([Request(seed=1)]).start(like), source.of([Request(seed=1)]).start(like)
    assert not torch.equal(first, second)


def test_a_picture_with_its_own_seed_is_the_same_at_any_batch_size():
    seeds = [Request(seed=seed, seed_mode="image") for seed in (5, 6, 7)]
    together = NoiseSource(CPU).of(seeds)(torch.empty(3, 4, 8, 8))
    alone = NoiseSource(CPU).of(seeds[1:2])(torch.empty(1, 4, 8, 8))
    assert torch.equal(together[1:2], alone)


def test_a_fixed_code_starts_every_batch_alike_a_shorter_one_too():
    source = NoiseSource(CPU)
    batch = [Request(seed=1, fixed_code=True)]
    first = source.of(batch).start(torch.empty(3, 4, 8, 8))
    source.of(batch)(torch.empty(3, 4, 8, 8))
    assert torch.equal(source.of(batch).start(torch.empty(2, 4, 8, 8)), first[:2])


def test_a_fixed_code_has_a_start_for_each_size_and_for_the_most_pictures():
    noise = NoiseSource(CPU).of([Request(fixed_code=True)])
    one = noise.start(torch.empty(1, 4, 8, 8))
    wide = noise.start(torch.empty(2, 4, 8, 16))
    three = noise.start(torch.empty(3, 4, 8, 8))
    assert (one.shape, wide.shape, three.shape) == ((1, 4, 8, 8), (2, 4, 8, 16), (3, 4, 8, 8))
    assert torch.equal(noise.start(torch.empty(2, 4, 8, 8)), three[:2])
    assert torch.equal(noise.start(torch.empty(2, 4, 8, 16)), wide)
    noise(torch.empty(1, 4, 8, 8))
    again = NoiseSource(CPU).of([Request(fixed_code=True)])
    again.repeat(noise.history)
    assert torch.equal(again.start(torch.empty(3, 4, 8, 8)), three)
    assert torch.equal(again(torch.empty(1, 4, 8, 8)), noise(torch.empty(1, 4, 8, 8)))


def test_history_brings_another_noise_to_the_same_point():
    def fresh() -> Noise:
        return Noise([torch.Generator().manual_seed(3)])

    one = fresh()
    one.start(torch.empty(3, 4, 8, 8))
    one(torch.empty(3, 4, 8, 8))
    one(torch.empty(1, 4, 8, 8))
    assert one.history == [[3, 4, 8, 8, 2], [1, 4, 8, 8, 1]]
    other = fresh()
    other.repeat(one.history)
    assert torch.equal(one(torch.empty(2, 4, 8, 8)), other(torch.empty(2, 4, 8, 8)))


@pytest.mark.parametrize("fixed_start", [False, True])
def test_reach_comes_to_a_history_from_before_it_and_from_beyond_it(fixed_start):
    def fresh() -> Noise:
        return Noise([torch.Generator().manual_seed(3)], fixed_start)

    def go(noise: Noise, batches: int) -> None:
        for _ in range(batches):
            like = torch.empty(2, 4, 8, 8)
            noise.start(like)
            noise(like)
        noise(torch.empty(1, 4, 8, 8))

    there = fresh()
    go(there, 3)
    before, behind, beyond = fresh(), fresh(), fresh()
    behind(torch.empty(2, 4, 8, 8))
    go(beyond, 5)
    for noise in (before, behind, beyond):
        noise.reach(there.history)
        assert noise.history == there.history
    like = torch.empty(2, 4, 8, 8)
    wanted = [there.start(like), there(like)]
    for noise in (before, beyond):
        assert all(map(torch.equal, wanted, [noise.start(like), noise(like)]))
