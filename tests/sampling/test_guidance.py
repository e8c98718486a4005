import pytest
import torch

from ldm.sampling.denoiser import Denoiser
from ldm.sampling.guidance import Away, Guidance, Told, ask, guide, stack
from ldm.sampling.prediction import Level, to_prediction


class Recorder:
    """A network that answers x * conditioning and remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, cond):
        self.calls.append((x, t, cond))
        while isinstance(cond, dict | list):
            cond = next(iter(cond.values())) if isinstance(cond, dict) else cond[0]
        return x * cond


X, T = torch.full((2, 1), 3.0), torch.tensor([7, 7])
COND, UNCOND = torch.full((2, 1), 2.0), torch.full((2, 1), 1.0)


def test_guidance_extrapolates_from_the_unconditional_in_one_call():
    network = Recorder()
    out = guide(network, COND, UNCOND, 7.5)(X, T)
    torch.testing.assert_close(out, 3 * UNCOND + 7.5 * (3 * COND - 3 * UNCOND))
    ((x, t, cond),) = network.calls
    assert x.tolist() == [[3.0]] * 4 and t.tolist() == [7] * 4
    assert cond.flatten().tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("uncond, scale", [(None, 7.5), (UNCOND, 1.0), (None, 0.0)])
def test_without_an_unconditional_or_at_scale_one_the_network_sees_the_batch_as_it_is(uncond, scale):
    network = Recorder()
    torch.testing.assert_close(guide(network, COND, uncond, scale)(X, T), 3 * COND)
    assert len(network.calls[0][0]) == 2
    assert network.calls[0][2] is COND


def test_scale_zero_is_the_unconditional():
    torch.testing.assert_close(guide(Recorder(), COND, UNCOND, 0.0)(X, T), 3 * UNCOND)


def test_the_picture_and_the_text_of_an_edit_guide_by_themselves():
    network = Recorder()
    said = ask(network, Told(uncond=UNCOND, image=3 * UNCOND, cond=COND))(X, T, alone=False)
    out = Guidance(scale=7.5, image_scale=1.5)(said)
    torch.testing.assert_close(out, 3 * UNCOND + 1.5 * (9 * UNCOND - 3 * UNCOND) + 7.5 * (3 * COND - 9 * UNCOND))
    ((x, _, cond),) = network.calls
    assert len(x) == 6 and cond.flatten().tolist() == [1, 1, 3, 3, 2, 2]


def test_lists_and_dicts_of_tensors_are_stacked_entry_by_entry():
    cond = {"c_crossattn": [COND], "c_adm": COND}
    uncond = {"c_adm": UNCOND, "c_crossattn": [UNCOND]}
    both = stack(uncond, cond)
    assert both["c_crossattn"][0].flatten().tolist() == both["c_adm"].flatten().tolist() == [1, 1, 2, 2]
    assert stack([UNCOND], [COND])[0].flatten().tolist() == [1, 1, 2, 2]
    torch.testing.assert_close(guide(Recorder(), cond, uncond, 3.0)(X, T), torch.full((2, 1), 12.0))


def test_an_entry_that_holds_no_tensor_passes_through():
    cond = {"c_crossattn": [COND], "c_concat": None, "note": "kept"}
    both = stack({"c_crossattn": [UNCOND], "c_concat": None}, cond)
    assert both["c_concat"] is None and both["note"] == "kept"


@pytest.mark.parametrize(
    "uncond, cond", [({}, {"c_concat": [COND]}), (UNCOND, [COND]), ({"c_crossattn": None}, {"c_crossattn": [COND]})]
)
def test_conditionings_of_two_structures_are_refused(uncond, cond):
    with pytest.raises(ValueError, match="structure of the conditional"):
        guide(Recorder(), cond, uncond, 2.0)


def test_away_from_a_concept_goes_by_the_equations_of_the_paper():
    # A place past the concept, one as far from it as the threshold, and one so near that the scale does not reach 1.
    base, cond, concept = torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 0.999]]), torch.tensor([[2.0, 0.5, 0.994]])
    away = Away(scale=100.0, warmup=1, threshold=0.5, momentum_scale=0.5, beta=0.4)
    first = torch.tensor([[2.0, 0.0, 0.5 * 0.994]])
    assert away(base, cond, concept).tolist() == [[0.0] * 3]
    torch.testing.assert_close(away.momentum, 0.6 * first)
    second = first + 0.5 * 0.6 * first
    torch.testing.assert_close(away(base, cond, concept), second)
    torch.testing.assert_close(away.momentum, 0.4 * 0.6 * first + 0.6 * second)


@pytest.mark.parametrize("image", [None, 2.0])
def test_what_is_taken_off_is_multiplied_by_the_scale_of_the_text(image):
    away = Away(scale=1e6, warmup=0, threshold=10.0, momentum_scale=0.0, beta=0.0)
    said = Told(*(None if one is None else torch.tensor([[one]]) for one in (1.0, image, 4.0, 6.0)))
    base, seen = (1.0, 1.0) if image is None else (2.0, 1.0 + 1.5 * (2.0 - 1.0))
    out = Guidance(scale=7.5, image_scale=1.5, away=away)(said)
    assert out.item() == pytest.approx(seen + 7.5 * ((4.0 - base) - (6.0 - base)))


@pytest.mark.parametrize("kind", ["v", "x0"])
def test_a_concept_is_kept_away_from_in_the_noise_whatever_the_network_predicts(kind):
    level = Level(t=7, alpha=0.6, sigma=0.8)
    x, *noises = torch.randn(5, 2, 1, 4, generator=torch.Generator().manual_seed(0))

    def denoise(kind: str) -> Denoiser:
        def say(eps: torch.Tensor) -> torch.Tensor:
            seen = to_prediction("eps", x, eps, level)
            return {"eps": seen.eps, "x0": seen.x0, "v": level.alpha * seen.eps - level.sigma * seen.x0}[kind]

        said = Told(uncond=say(noises[0]), cond=say(noises[1]), concept=say(noises[2]))
        return Denoiser(lambda x, t, alone: said, kind, Guidance(7.5, away=Away(0.8, 0, 0.2, 0.3, 0.4)))

    here, there = denoise("eps"), denoise(kind)
    for _ in range(3):
        torch.testing.assert_close(there(x, level), here(x, level), rtol=1e-4, atol=1e-4)


def test_where_there_is_noise_alone_a_concept_changes_nothing():
    away = Away(1000.0, 0, 0.01, 0.3, 0.4)
    said = Told(uncond=UNCOND, cond=COND, concept=3 * COND)
    torch.testing.assert_close(Guidance(7.5, away=away)(said, slope=0.0), UNCOND + 7.5 * (COND - UNCOND))
    assert away.calls == 0
