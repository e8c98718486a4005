import math

import pytest
import torch
from torch import nn

from ldm.errors import ModelError
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator
from ldm.modules.losses.contperceptual import DummyLoss, silhouette
from ldm.modules.losses.discriminator import NLayerDiscriminator, adopt_weight, hinge_d_loss, vanilla_d_loss
from ldm.modules.losses.lpips import LPIPS
from ldm.modules.losses.vqperceptual import VQLPIPSWithDiscriminator, measure_perplexity
from ldm.util import get_obj_from_str


@pytest.fixture
def pictures():
    """Two pictures and what a one-layer decoder makes of a latent; its weight is the last layer."""
    torch.manual_seed(0)
    last_layer = nn.Parameter(0.1 * torch.randn(3, 4, 1, 1))
    reconstructions = nn.functional.conv2d(torch.randn(2, 4, 32, 32), last_layer)
    return torch.rand(2, 3, 32, 32) * 2 - 1, reconstructions, last_layer


def kl_loss(**options) -> LPIPSWithDiscriminator:
    torch.manual_seed(1)
    return LPIPSWithDiscriminator(disc_start=10, perceptual_weight=0, disc_num_layers=2, **options)


def vq_loss(**options) -> VQLPIPSWithDiscriminator:
    torch.manual_seed(1)
    return VQLPIPSWithDiscriminator(disc_start=10, perceptual_weight=0, disc_num_layers=2, **options)


def test_names_of_old_configs_lead_to_the_losses():
    assert get_obj_from_str("taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator") is VQLPIPSWithDiscriminator
    assert get_obj_from_str("ldm.modules.losses.LPIPSWithDiscriminator") is LPIPSWithDiscriminator
    assert isinstance(DummyLoss(), nn.Module)


def test_before_its_start_the_discriminator_adds_nothing(pictures):
    x, reconstruction, last_layer = pictures
    posterior = DiagonalGaussianDistribution(torch.randn(2, 8, 4, 4))
    loss, parts = kl_loss(kl_weight=0.5, logvar_init=0.3)(x, reconstruction, posterior, 0, 9, last_layer)
    nll = (x - reconstruction).abs() / math.exp(0.3) + 0.3
    torch.testing.assert_close(loss, (nll.sum() + 0.5 * posterior.kl().sum()) / 2)
    assert parts["train/disc_factor"] == parts["train/d_weight"] == 0
    assert parts["train/rec_loss"] == (x - reconstruction).abs().mean()


def test_a_latent_that_is_not_the_picture_made_small_costs_by_the_square_of_the_difference(pictures):
    x, reconstruction, last_layer = pictures
    small = 2 * nn.functional.avg_pool2d(x, 8)
    moments = torch.cat([small + 0.5, torch.randn(2, 5, 4, 4)], dim=1)  # three channels of the mean are off by 0.5
    posterior = DiagonalGaussianDistribution(moments)
    plain, _ = kl_loss()(x, reconstruction, posterior, 0, 9, last_layer)
    loss, parts = kl_loss(thumbnail_weight=30.0)(x, reconstruction, posterior, 0, 9, last_layer)
    torch.testing.assert_close(parts["train/thumbnail_loss"], torch.tensor(3 * 4 * 4 * 0.5**2))
    torch.testing.assert_close(loss, plain + 30.0 * parts["train/thumbnail_loss"])


def test_a_silhouette_is_what_differs_from_the_colour_along_the_edge():
    picture = torch.empty(1, 3, 16, 16)
    picture[:] = torch.tensor([-0.5, 0.2, 0.9]).view(1, 3, 1, 1)
    picture[0, :, 4:9, 5:12] = torch.tensor([0.1, 0.1, 0.1]).view(3, 1, 1)
    picture[0, 0, 12, 12] += 0.05  # a change of light
    picture[0, 0, 13, 3] += 0.3  # half way to another colour
    shape = torch.full((1, 1, 16, 16), -1.0)
    shape[..., 4:9, 5:12], shape[..., 13, 3] = 1.0, 0.0
    torch.testing.assert_close(silhouette(picture), shape)


def test_the_channel_after_the_thumbnail_is_asked_to_be_the_silhouette_made_small(pictures):
    _, reconstruction, last_layer = pictures
    x = torch.zeros(2, 3, 32, 32)
    x[1, :, 8:16, 8:16] = 1.0  # one latent pixel of a patch
    posterior = DiagonalGaussianDistribution(torch.zeros(2, 8, 4, 4))
    plain, _ = kl_loss()(x, reconstruction, posterior, 0, 9, last_layer)
    loss, parts = kl_loss(silhouette_weight=3.0)(x, reconstruction, posterior, 0, 9, last_layer)
    torch.testing.assert_close(parts["train/silhouette_loss"], torch.tensor(4 * 4 * 2.0**2))
    torch.testing.assert_close(loss, plain + 3.0 * parts["train/silhouette_loss"])


def test_the_adaptive_weight_balances_both_gradients_at_the_last_layer(pictures):
    x, reconstruction, last_layer = pictures
    loss, posterior = kl_loss(kl_weight=0.0, disc_weight=0.5), DiagonalGaussianDistribution(torch.randn(2, 8, 4, 4))
    total, parts = loss(x, reconstruction, posterior, 0, 10, last_layer)
    nll, g = (x - reconstruction).abs().sum() / 2, -loss.discriminator(reconstruction).mean()
    nll_norm, g_norm = (torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm() for term in (nll, g))
    weight = 0.5 * nll_norm / (g_norm + 1e-4)
    torch.testing.assert_close(parts["train/d_weight"], weight)
    torch.testing.assert_close(total, nll + weight * g)


def test_without_gradients_the_adversarial_term_is_left_out(pictures):
    x, _, last_layer = pictures
    posterior = DiagonalGaussianDistribution(torch.randn(2, 8, 4, 4))
    with torch.no_grad():
        _, parts = kl_loss()(x, x, posterior, 0, 10, last_layer, split="val")
    assert parts["val/d_weight"] == 0


def test_pixels_may_count_differently(pictures):
    x, reconstruction, last_layer = pictures
    posterior = DiagonalGaussianDistribution(torch.zeros(2, 8, 4, 4))
    weights = torch.zeros(1, 1, 32, 32)
    weights[..., :16] = 1
    loss, _ = kl_loss()(x, reconstruction, posterior, 0, 0, last_layer, weights=weights)
    torch.testing.assert_close(loss, (x - reconstruction).abs()[..., :16].sum() / 2)


@pytest.mark.parametrize(("kind", "formula"), [("hinge", hinge_d_loss), ("vanilla", vanilla_d_loss)])
def test_the_discriminator_learns_from_detached_pictures(pictures, kind, formula):
    x, reconstruction, last_layer = pictures
    loss = kl_loss(disc_loss=kind, disc_factor=0.7)
    loss.eval()
    total, parts = loss(x, reconstruction, None, 1, 10)
    torch.testing.assert_close(total, 0.7 * formula(loss.discriminator(x), loss.discriminator(reconstruction)))
    total.backward()
    assert last_layer.grad is None
    assert set(parts) == {"train/disc_loss", "train/logits_real", "train/logits_fake"}


def test_hinge_and_vanilla_losses_have_their_known_values():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])
    assert hinge_d_loss(real, fake).item() == 0.5 * (0.5 + 1.0)
    want = 0.5 * sum(math.log1p(math.exp(v)) / 2 for v in (-2.0, 0.0, -2.0, 1.0))
    assert vanilla_d_loss(real, fake).item() == pytest.approx(want)


def test_a_weight_is_adopted_from_its_step_on():
    assert [adopt_weight(0.8, step, threshold=5) for step in (4, 5)] == [0.0, 0.8]


@pytest.mark.parametrize(("pixel_loss", "power"), [("l1", 1), ("l2", 2)])
def test_the_codebook_loss_is_weighed_against_the_pixels(pictures, pixel_loss, power):
    x, reconstruction, last_layer = pictures
    loss = vq_loss(codebook_weight=2.0, pixel_loss=pixel_loss, n_classes=4)
    ids = torch.tensor([0, 0, 1, 1])
    total, parts = loss(torch.tensor(0.5), x, reconstruction, 0, 0, last_layer, predicted_indices=ids)
    torch.testing.assert_close(total, (x - reconstruction).abs().pow(power).mean() + 1.0)
    assert parts["train/cluster_usage"] == 2
    assert parts["train/quant_loss"] == 0.5


def test_perplexity_counts_codes_that_are_used_alike():
    perplexity, used = measure_perplexity(torch.arange(8).view(2, 4) % 4, 16)
    assert perplexity.item() == pytest.approx(4)
    assert used == 4


def test_the_discriminator_judges_patches():
    net = NLayerDiscriminator(3, ndf=8, n_layers=3)
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    assert net.main[0].weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert {"main.0.bias", "main.2.weight", "main.3.running_mean", "main.11.weight"} <= set(net.state_dict())


def test_a_conditional_discriminator_sees_the_condition(pictures):
    x, reconstruction, _ = pictures
    loss = kl_loss(disc_conditional=True, disc_in_channels=4)
    total, _ = loss(x, reconstruction, None, 1, 10, cond=torch.zeros(2, 1, 32, 32))
    assert total.isfinite()
    with pytest.raises(ValueError, match="disc_conditional"):
        loss(x, reconstruction, None, 1, 10)


@pytest.mark.parametrize("wrong", [{"disc_loss": "wasserstein"}, {"use_actnorm": True}])
def test_options_that_do_not_exist_are_refused(wrong):
    with pytest.raises(ValueError, match=r"disc_loss|use_actnorm"):
        kl_loss(**wrong)


def test_an_unknown_pixel_loss_is_refused():
    with pytest.raises(ValueError, match="pixel_loss"):
        vq_loss(pixel_loss="l3")


# ---------------------------------------------------------------------------------------------------------------- LPIPS


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """Weights in the two files in which they are published: VGG16 as torchvision has it, channel weights apart."""
    generator, folder = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("lpips")
    vgg, channels = {}, {}
    for key, weight in LPIPS().named_parameters():
        drawn = torch.randn(weight.shape, generator=generator) / max(1, weight[0].numel()) ** 0.5
        if key.startswith("net."):
            vgg["features." + key.split(".", 2)[2]] = drawn
        else:
            channels[key] = drawn.abs()
    torch.save(vgg, folder / "vgg16.pth")
    torch.save(channels, folder / "vgg.pth")
    return [str(folder / "vgg16.pth"), str(folder / "vgg.pth")]


def test_lpips_without_weights_says_what_to_do():
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ModelError, match="perceptual_files"):
        LPIPS()(x, x)


def test_lpips_is_zero_for_the_same_picture_and_grows_with_the_difference(lpips_files):
    x, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 3, 32, 32)
    distance = LPIPS(lpips_files)
    assert distance(x, x).tolist() == [[[[0.0]]], [[[0.0]]]]
    assert (distance(x, x + 0.1 * noise) < distance(x, x + 0.5 * noise)).all()


def test_lpips_has_the_keys_that_autoencoder_checkpoints_carry():
    keys = set(LPIPS().state_dict())
    assert {"scaling_layer.shift", "scaling_layer.scale", "lin0.model.1.weight", "lin4.model.1.weight"} <= keys
    numbers = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
    convolutions = {f"net.slice{i}.{n}.{leaf}" for i, ns in numbers.items() for n in ns for leaf in ("weight", "bias")}
    assert convolutions == {key for key in keys if key.startswith("net.")}


def test_lpips_weights_that_come_with_a_checkpoint_are_enough(lpips_files):
    x = torch.rand(2, 3, 32, 32)
    source, target = LPIPS(lpips_files), LPIPS()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x, x + 0.3), source(x, x + 0.3))


def test_incomplete_lpips_files_are_named(lpips_files):
    with pytest.raises(ModelError, match=r"vgg16\.pth lack 5 weights of LPIPS, e\.g\. lin0\.model\.1\.weight"):
        LPIPS(lpips_files[0])


def test_the_perceptual_distance_is_part_of_the_reconstruction_loss(pictures, lpips_files):
    x, reconstruction, last_layer = pictures
    loss = LPIPSWithDiscriminator(disc_start=10, perceptual_weight=0.25, perceptual_files=lpips_files)
    posterior = DiagonalGaussianDistribution(torch.zeros(2, 8, 4, 4))
    total, _ = loss(x, reconstruction, posterior, 0, 0, last_layer)
    distance = LPIPS(lpips_files)(x, reconstruction)
    torch.testing.assert_close(total, ((x - reconstruction).abs() + 0.25 * distance).sum() / 2)
