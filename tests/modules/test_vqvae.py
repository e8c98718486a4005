import numpy as np
import pytest
import torch

from ldm.modules.vqvae import VectorQuantizer


def quantizer(**options) -> VectorQuantizer:
    layer = VectorQuantizer(4, 2, beta=0.25, **options)
    layer.embedding.weight.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    return layer


Z = torch.tensor([[0.9, 0.2], [0.1, 0.8]]).T[None, :, None]  # (1, 2, 1, 2): pixels near codes 1 and 2


def test_each_pixel_becomes_its_nearest_code():
    quantised, _, (_, _, ids) = quantizer()(Z)
    torch.testing.assert_close(quantised[0, :, 0].T, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert ids.tolist() == [1, 2]
    assert quantizer(sane_index_shape=True)(Z)[2][2].shape == (1, 1, 2)


@pytest.mark.parametrize(("legacy", "pull", "push"), [(True, 1.0, 0.25), (False, 0.25, 1.0)])
def test_the_loss_pulls_latents_to_codes_and_codes_to_latents(legacy, pull, push):
    layer, z = quantizer(legacy=legacy), Z.clone().requires_grad_()
    _, loss, _ = layer(z)
    distance = (0.1**2 + 0.2**2) / 2
    assert loss.item() == pytest.approx(1.25 * distance)
    loss.backward()
    torch.testing.assert_close(z.grad[0, :, 0, 0], pull * torch.tensor([-0.1, 0.2]) * 2 / 4)
    torch.testing.assert_close(layer.embedding.weight.grad[1], push * torch.tensor([0.1, -0.2]) * 2 / 4)


def test_the_gradient_passes_straight_through():
    z = Z.clone().requires_grad_()
    quantizer()(z)[0].sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))


def test_ids_lead_back_to_the_codes():
    layer = quantizer()
    quantised, _, (_, _, ids) = layer(Z)
    assert torch.equal(layer.get_codebook_entry(ids, (1, 1, 2, 2)), quantised.detach())
    assert torch.equal(layer.get_codebook_entry(torch.tensor([[3]])), torch.tensor([[[1.0, 1.0]]]))


def test_half_precision_weights_find_the_same_codes():
    torch.manual_seed(0)
    layer, z = VectorQuantizer(512, 4, beta=0.25), torch.rand(1, 4, 16, 16) / 512
    layer.embedding.weight.data = layer.embedding.weight.data.bfloat16().float()
    want = layer(z)[2][2]
    quantised, _, (_, _, ids) = layer.to(torch.bfloat16)(z)
    assert torch.equal(ids, want)
    assert quantised.dtype == torch.float32


def test_ids_in_use_are_numbered_from_zero(tmp_path):
    np.save(tmp_path / "used.npy", np.array([2, 3]))
    options = {"remap": str(tmp_path / "used.npy")}
    assert quantizer(**options, unknown_index="extra")(Z)[2][2].tolist() == [2, 0]
    assert quantizer(**options, unknown_index=1)(Z)[2][2].tolist() == [1, 0]
    assert quantizer(**options)(Z)[2][2][0] in (0, 1)
    assert quantizer(**options).get_codebook_entry(torch.tensor([1])).tolist() == [[1.0, 1.0]]


def test_there_is_no_temperature():
    with pytest.raises(ValueError, match="temperature"):
        quantizer()(Z, temp=0.5)
