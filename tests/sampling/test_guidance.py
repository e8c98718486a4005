import pytest
import torch

from ldm.sampling.guidance import Guidance, Told, ask, guide, stack


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
    said = ask(network, Told(uncond=UNCOND, image=3 * UNCOND, cond=COND))(X, T)
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
