import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from support import CONTRACTS, GOLDENS, assert_matches, cases, golden, manifest, tiny_model
from torch import nn

from ldm.config import load_config
from ldm.errors import ConfigError
from ldm.models.diffusion import ddpm
from ldm.models.diffusion.ddpm import DDPM, DiffusionWrapper, LatentDiffusion, uniform_on_device
from ldm.sampling.prediction import to_prediction
from ldm.sampling.schedule import Schedule
from ldm.util import instantiate_from_config

IDENTITY = {"target": "torch.nn.Identity"}
SCHEDULE = [key for key in manifest("sd-v1") if "." not in key]


class Recorder(nn.Module):
    """A network that keeps what it was given, and puts out `value` everywhere."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.value = value

    def forward(self, x, timesteps=None, context=None, y=None):
        self.got = {"x": x, "t": timesteps, "context": context, "y": y}
        return torch.full_like(x, self.value)


def pixel_model(value: float = 0.0, **params) -> DDPM:
    defaults = {"timesteps": 8, "image_size": 4, "channels": 3, "use_ema": False, "log_every_t": 4}
    model = DDPM(unet_config=IDENTITY, **(defaults | params))
    model.model.diffusion_model = Recorder(value)
    return model


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The checkpoint format ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [key for key in golden("schedule") if key.startswith("schedule/") and "_S" not in key])
def test_the_schedule_buffers_are_those_of_the_original(name):
    # The original took the weights of the bound in float32, all else in float64 as here.
    tolerance = 1e-5 if name.endswith("lvlb_weights") else 0.0
    assert_matches(getattr(tiny_model(), name.removeprefix("schedule/")), golden("schedule")[name], tolerance)


@pytest.mark.parametrize(
    "layout, config, changes",
    [
        ("sd-v1", "stable-diffusion/v1-inference.yaml", {}),
        ("sd-v1-full-ema", "stable-diffusion/v1-inference.yaml", {"use_ema": True}),
        ("sd-v1-inpainting", "stable-diffusion/v1-inpainting-inference.yaml", {"use_ema": False}),
        ("ldm-txt2img-1p4B", "latent-diffusion/txt2img-1p4B-eval.yaml", {}),
    ],
)
def test_the_state_dict_has_the_keys_shapes_types_and_order_of_the_published_checkpoint(layout, config, changes):
    section = load_config(CONTRACTS.parents[1] / "configs" / config).model
    section.params.update(changes)
    with torch.device("meta"):
        state = instantiate_from_config(section).state_dict()
    got = {key: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in state.items()}
    assert got == manifest(layout)
    assert list(got) == list(manifest(layout))


def test_a_model_built_on_meta_has_a_real_schedule(small_model):
    with torch.device("meta"):
        built = small_model(learn_logvar=True, scale_by_std=True)
    real = small_model()
    for name in [*SCHEDULE, "lvlb_weights", "cond_ids"]:
        torch.testing.assert_close(getattr(built, name), getattr(real, name), rtol=0, atol=0)
    assert built.scale_factor == 1.0
    assert built.logvar.device.type == "cpu"
    assert built.model.diffusion_model.out[2].weight.is_meta


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)], ids=["half", "bfloat16"])
def test_a_cast_leaves_the_schedule_in_full_precision(small_model, cast):
    exact = small_model(scale_by_std=True, scale_factor=0.18215)
    model = cast(small_model(scale_by_std=True, scale_factor=0.18215))
    assert model.model.diffusion_model.out[2].weight.dtype != torch.float32
    for name in [*SCHEDULE, "lvlb_weights", "logvar", "scale_factor"]:
        torch.testing.assert_close(getattr(model, name), getattr(exact, name), rtol=0, atol=0)


def test_a_move_takes_the_schedule_along(small_model):
    assert small_model().to("meta").alphas_cumprod.is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_takes_and_gives_full_precision(small_model, batch, dtype):
    model = small_model().eval()
    x, c, t = batch["image"].movedim(-1, 1), batch["txt"], torch.tensor([1, 7])
    with torch.no_grad():
        exact = model.apply_model(x, t, c)
        out = model.to(dtype).apply_model(x, t, c)
    assert out.dtype == torch.float32
    assert_matches(out, exact, tolerance=0.05)


def test_every_public_name_is_found_in_this_module():
    missing = [name for name in ddpm.__all__ if not callable(getattr(ddpm, name, None))]
    assert not missing
    with pytest.raises(AttributeError, match="no attribute Nothing"):
        ddpm.Nothing  # noqa: B018


# The process ----------------------------------------------------------------------------------------------------------


def test_noising_matches_the_original():
    inputs, want = golden("inputs"), golden("training")["loss_eps/q_sample"]
    assert_matches(tiny_model().q_sample(inputs["x_start"], inputs["t_loss"], noise=inputs["noise"]), want, 1e-6)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_every_parameterization_recovers_the_start_from_its_own_target(kind):
    model = pixel_model(parameterization=kind)
    x0, noise = torch.randn(2, 8, 3, 4, 4)
    t = torch.arange(8)
    x_t = model.q_sample(x0, t, noise)
    out = model.target(x0, t, noise)
    torch.testing.assert_close(model.predict_start(x_t, t, out), x0, rtol=1e-4, atol=1e-4)
    level = Schedule(model.alphas_cumprod).level(5)
    torch.testing.assert_close(to_prediction(kind, x_t[5], out[5], level).x0, x0[5], rtol=1e-4, atol=1e-4)


def test_a_velocity_tells_the_noise():
    model = pixel_model()
    x0, noise = torch.randn(2, 8, 3, 4, 4)
    t = torch.arange(8)
    v = model.get_v(x0, noise, t)
    torch.testing.assert_close(model.predict_eps_from_z_and_v(model.q_sample(x0, t, noise), t, v), noise)


def test_the_posterior_of_the_first_step_is_the_start_itself():
    model = pixel_model()
    x0, x_t = torch.randn(2, 1, 3, 4, 4)
    mean, variance, log_variance = model.q_posterior(x0, x_t, torch.tensor([0]))
    torch.testing.assert_close(mean, x0)
    assert variance.item() == 0.0
    assert log_variance.item() == pytest.approx(np.log(1e-20))


def test_v_posterior_moves_the_variance_from_the_posterior_to_beta():
    torch.testing.assert_close(pixel_model(v_posterior=1.0).posterior_variance, pixel_model().betas)


def test_given_betas_are_the_schedule():
    model = pixel_model(given_betas=[0.1, 0.2])
    assert model.num_timesteps == 2
    torch.testing.assert_close(model.alphas_cumprod, torch.tensor([0.9, 0.72]))


def test_zero_terminal_snr_ends_in_pure_noise_and_begins_where_it_did():
    plain, rescaled = pixel_model(), pixel_model(zero_terminal_snr=True, parameterization="v")
    assert rescaled.alphas_cumprod[-1] == 0.0
    torch.testing.assert_close(rescaled.alphas_cumprod[0], plain.alphas_cumprod[0])
    noise = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(rescaled.q_sample(torch.ones(1, 3, 4, 4), torch.tensor([7]), noise), noise)
    assert rescaled.sample(1).isfinite().all()


def test_zero_terminal_snr_is_refused_where_the_network_predicts_noise():
    with pytest.raises(ConfigError, match="parameterization v or x0"):
        pixel_model(zero_terminal_snr=True)


# Conditioning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, channels, context, label",
    [
        (None, 4, None, None),
        ("concat", 5, None, None),
        ("crossattn", 4, 6, None),
        ("hybrid", 5, 6, None),
        ("adm", 4, None, "token"),
        ("hybrid-adm", 5, 6, "adm"),
        ("crossattn-adm", 4, 6, "adm"),
    ],
)
def test_each_conditioning_key_feeds_its_own_part_of_the_condition(key, channels, context, label):
    wrapper = DiffusionWrapper(IDENTITY, key)
    wrapper.diffusion_model = network = Recorder()
    tokens, adm = torch.randn(2, 3, 8), torch.randn(2, 5)
    t = torch.tensor([1, 2])
    wrapper(torch.randn(2, 4, 8, 8), t, c_concat=[torch.randn(2, 1, 8, 8)], c_crossattn=[tokens, tokens], c_adm=adm)
    got = network.got
    assert got["x"].shape == (2, channels, 8, 8)
    assert got["t"] is t
    assert got["context"] is None if context is None else got["context"].shape == (2, context, 8)
    assert got["y"] is {None: None, "token": tokens, "adm": adm}[label]


def test_a_scripted_network_is_called_instead_by_position():
    wrapper = DiffusionWrapper(IDENTITY, "crossattn-adm")
    wrapper.diffusion_model, wrapper.scripted_diffusion_model = Recorder(), Recorder(1.0)
    adm = torch.randn(2, 5)
    out = wrapper(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), c_crossattn=[torch.randn(2, 3, 8)], c_adm=adm)
    assert out.unique().item() == 1.0
    assert wrapper.scripted_diffusion_model.got["y"] is adm


def test_an_unknown_conditioning_key_is_refused_by_name():
    with pytest.raises(ConfigError, match="'crossatn'"):
        DiffusionWrapper(IDENTITY, "crossatn")


@pytest.mark.parametrize("key, name", [("concat", "c_concat"), ("crossattn", "c_crossattn")])
@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: [c]], ids=["tensor", "list"])
def test_a_bare_condition_goes_where_the_conditioning_key_says(small_model, key, name, wrap):
    model = small_model(conditioning_key=key)
    model.model.diffusion_model = network = Recorder()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    c = torch.randn(2, 4, 8, 8) if key == "concat" else torch.randn(2, 3, 8)
    model.apply_model(x, t, cond=wrap(c))
    bare = network.got
    model.apply_model(x, t, {name: [c]})
    for part in ("x", "context"):
        assert (bare[part] is None and network.got[part] is None) or torch.equal(bare[part], network.got[part])


@pytest.mark.parametrize(
    "params, key",
    [
        ({}, "concat"),
        ({"concat_mode": False}, "crossattn"),
        ({"conditioning_key": "hybrid"}, "hybrid"),
        ({"cond_stage_config": "__is_unconditional__"}, None),
        ({"cond_stage_config": "__is_unconditional__", "force_null_conditioning": True}, "concat"),
    ],
)
def test_the_conditioning_key_follows_from_the_configuration(small_model, params, key):
    assert small_model(**({"conditioning_key": None} | params)).model.conditioning_key == key


def test_the_words_for_a_stage_share_the_autoencoder_or_leave_it_out(small_model):
    shared = small_model(cond_stage_config="__is_first_stage__")
    assert shared.cond_stage_model is shared.first_stage_model
    assert small_model(cond_stage_config="__is_unconditional__").cond_stage_model is None
    with pytest.raises(ConfigError, match="cond_stage_trainable"):
        small_model(cond_stage_config="__is_first_stage__", cond_stage_trainable=True)


def test_frozen_stages_stay_in_eval_mode_and_learn_nothing():
    model = instantiate_from_config(OmegaConf.load(GOLDENS / "tiny.yaml").model)
    model.train()
    model.first_stage_model.train()
    assert model.model.training
    assert not model.first_stage_model.training
    assert not any(p.requires_grad for p in model.first_stage_model.parameters())
    assert not pickle.loads(pickle.dumps(model.first_stage_model)).train().training


class Encoder(nn.Module):
    """A cond stage with an `encode` and another method."""

    def encode(self, texts):
        return torch.tensor([[[float(len(text))] * 8] for text in texts])

    def shout(self, texts):
        return -self.encode(texts)


def test_texts_are_encoded_by_the_method_that_the_configuration_names(small_model):
    model = small_model()
    model.cond_stage_model = Encoder()
    assert model.get_learned_conditioning(["ab"])[0, 0, 0] == 2.0
    model.cond_stage_forward = "shout"
    assert model.get_learned_conditioning(["ab"])[0, 0, 0] == -2.0


@pytest.mark.parametrize("label", ["", [""], OmegaConf.create([""])], ids=["text", "list", "config"])
def test_the_empty_condition_comes_once_for_each_of_the_batch(small_model, label):
    model = small_model()
    model.cond_stage_model = Encoder()
    torch.testing.assert_close(model.get_unconditional_conditioning(3, label), torch.zeros(3, 1, 8))


def test_the_empty_condition_of_a_text_model_needs_a_label(small_model):
    with pytest.raises(ValueError, match="null_label"):
        small_model().get_unconditional_conditioning(3)


def test_the_empty_class_is_the_one_that_the_encoder_keeps(small_model):
    stage = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 8, "n_classes": 5}}
    model = small_model(cond_stage_key="class_label", cond_stage_config=stage)
    empty = model.get_unconditional_conditioning(2)
    assert empty.shape == (2, 1, 8)
    torch.testing.assert_close(empty[0, 0], model.cond_stage_model.embedding.weight[-1])


# First stage ----------------------------------------------------------------------------------------------------------


def test_latents_are_scaled_on_the_way_in_and_out():
    model, inputs = tiny_model(), golden("inputs")
    posterior = model.encode_first_stage(inputs["image"])
    torch.manual_seed(3)
    z = model.get_first_stage_encoding(posterior)
    torch.manual_seed(3)
    torch.testing.assert_close(z, 0.18215 * posterior.sample())
    torch.testing.assert_close(model.get_first_stage_encoding(z), 0.18215 * z)
    torch.testing.assert_close(model.decode_first_stage(z), model.first_stage_model.decode(z / 0.18215))


def test_gradients_flow_only_through_the_differentiable_decoder():
    model = tiny_model()
    z = torch.randn(1, 4, 4, 4, requires_grad=True)
    assert not model.decode_first_stage(z).requires_grad
    assert model.differentiable_decode_first_stage(z).requires_grad


@pytest.fixture(scope="module")
def vq_model():
    stage = {"target": "ldm.models.autoencoder.VQModelInterface", "params": {
        "embed_dim": 3, "n_embed": 16, "lossconfig": IDENTITY, "ddconfig": {
            "double_z": False, "z_channels": 3, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32,
            "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}}}  # fmt: skip
    torch.manual_seed(0)
    return LatentDiffusion(stage, "__is_unconditional__", unet_config=IDENTITY, timesteps=8, use_ema=False).eval()


def test_a_vq_stage_snaps_latents_to_its_codebook_unless_told_not_to(vq_model):
    codes = vq_model.first_stage_model.quantize.embedding.weight
    near = codes[torch.tensor([[1, 2], [3, 4]])].movedim(-1, 0)[None] * (1 + 1e-3)
    snapped = codes[torch.tensor([[1, 2], [3, 4]])].movedim(-1, 0)[None]
    exact = vq_model.decode_first_stage(snapped, force_not_quantize=True)
    torch.testing.assert_close(vq_model.decode_first_stage(near), exact)
    assert not torch.equal(vq_model.decode_first_stage(near, force_not_quantize=True), exact)


def test_codebook_ids_or_their_scores_decode_to_their_codes(vq_model):
    ids = torch.tensor([[[1, 2], [3, 4]]])
    codes = vq_model.first_stage_model.quantize.embedding.weight[ids].movedim(-1, 1)
    want = vq_model.decode_first_stage(codes, force_not_quantize=True)
    torch.testing.assert_close(vq_model.decode_first_stage(ids, predict_cids=True), want)
    scores = nn.functional.one_hot(ids, 16).float().movedim(-1, 1)
    torch.testing.assert_close(vq_model.decode_first_stage(scores, predict_cids=True), want)


# get_input ------------------------------------------------------------------------------------------------------------


def test_a_batch_becomes_latents_and_their_condition(small_model, batch):
    z, c = small_model(scale_factor=2.0).get_input(batch, "image")
    torch.testing.assert_close(z, 2.0 * batch["image"].movedim(-1, 1))
    torch.testing.assert_close(c, batch["txt"])


def test_flags_add_the_picture_its_reconstruction_and_the_raw_condition(small_model, batch):
    model = small_model()
    flags = {"return_first_stage_outputs": True, "return_x": True, "return_original_cond": True}
    z, c, x, reconstruction, again, raw = model.get_input(batch, "image", bs=1, **flags)
    assert len(z) == len(c) == len(x) == 1
    torch.testing.assert_close(reconstruction, x)
    assert again is x
    torch.testing.assert_close(raw, batch["txt"])


def test_texts_classes_and_pictures_reach_the_encoder_as_it_wants_them(small_model, batch):
    model = small_model()
    model.cond_stage_model = Encoder()
    assert model.get_input(batch | {"txt": ["a", "abc"]}, "image")[1][:, 0, 0].tolist() == [1.0, 3.0]
    model.cond_stage_model = nn.Identity()
    assert model.get_input(batch, "image", cond_key="class_label")[1] is batch
    assert model.get_input(batch, "image", cond_key="image")[1].shape == (2, 4, 8, 8)
    assert model.get_input(batch | {"map": torch.ones(2, 8, 8)}, "image", cond_key="map")[1].shape == (2, 1, 8, 8)


def test_a_trained_cond_stage_encodes_with_the_loss_and_not_before(small_model, batch):
    model = small_model(cond_stage_trainable=True, cond_stage_config={"target": "torch.nn.Linear", "params": {
        "in_features": 8, "out_features": 8}})  # fmt: skip
    assert model.get_input(batch, "image")[1] is batch["txt"]
    assert not torch.equal(model.get_input(batch, "image", force_c_encode=True)[1], batch["txt"])
    nn.init.normal_(model.model.diffusion_model.out[2].weight)
    nn.init.normal_(model.model.diffusion_model.middle_block[1].proj_out.weight)
    model.shared_step(batch)[0].backward()
    assert model.cond_stage_model.weight.grad.abs().sum() > 0


def test_an_unconditional_model_gives_no_condition(small_model, batch):
    model = small_model(cond_stage_config="__is_unconditional__", conditioning_key=None)
    assert model.get_input(batch, "image", return_original_cond=True)[1:] == [None, None]


# Sampling -------------------------------------------------------------------------------------------------------------


def test_ancestral_sampling_arrives_where_the_network_points():
    model = pixel_model(value=0.25, parameterization="x0")
    torch.testing.assert_close(model.sample(2), torch.full((2, 3, 4, 4), 0.25))


def test_estimates_of_pixels_are_clipped():
    assert pixel_model(value=3.0, parameterization="x0").sample(1).max() == 1.0
    assert pixel_model(value=3.0, parameterization="x0", clip_denoised=False).sample(1).max() == pytest.approx(3.0)


def test_the_way_to_a_sample_is_kept_at_the_interval():
    _, seen = pixel_model().p_sample_loop((1, 3, 4, 4), return_intermediates=True)
    assert len(seen) == 4  # the noise, t = 7, t = 4, t = 0


def latent_model(small_model, value: float, **params) -> LatentDiffusion:
    defaults = {"parameterization": "x0", "cond_stage_config": "__is_unconditional__"}
    model = small_model(**(defaults | params))
    model.model.diffusion_model = Recorder(value)
    return model


def test_latents_arrive_where_the_network_points_and_callbacks_follow_each_step(small_model):
    model = latent_model(small_model, 2.5)
    steps, shapes = [], []
    x, seen = model.p_sample_loop(torch.zeros(2, 3, 8), (2, 4, 8, 8), return_intermediates=True, verbose=False,
                                  callback=steps.append, img_callback=lambda x, i: shapes.append(x.shape))  # fmt: skip
    torch.testing.assert_close(x, torch.full((2, 4, 8, 8), 2.5))
    assert steps == list(range(9, -1, -1))
    assert shapes == [(2, 4, 8, 8)] * 10
    assert len(seen) == 4  # x_T, t = 9, t = 5, t = 0


def test_a_walk_may_begin_below_the_noisiest_step(small_model):
    model = latent_model(small_model, 0.0)
    steps = []
    model.p_sample_loop(None, (1, 4, 8, 8), x_T=torch.zeros(1, 4, 8, 8), start_T=3, callback=steps.append)
    assert steps == [2, 1, 0]


def test_the_mask_keeps_the_given_latents(small_model):
    model = latent_model(small_model, 1.0, linear_start=1e-8, linear_end=1e-2)
    keep = torch.zeros(1, 1, 8, 8)
    keep[..., :4] = 1.0
    x = model.sample(None, batch_size=1, mask=keep, x0=torch.full((1, 4, 8, 8), -3.0), verbose=False)
    torch.testing.assert_close(x[..., :4], torch.full((1, 4, 8, 4), -3.0), atol=1e-2, rtol=0)
    torch.testing.assert_close(x[..., 4:], torch.ones(1, 4, 8, 4))
    with pytest.raises(ValueError, match="needs x0"):
        model.sample(None, batch_size=1, mask=keep, verbose=False)


def test_progressive_denoising_returns_the_estimates_on_the_way(small_model):
    model = latent_model(small_model, 0.5, cond_stage_config=IDENTITY)
    cond = {"c_crossattn": [torch.zeros(5, 3, 8)]}
    x, estimates = model.progressive_denoising(cond, (4, 8, 8), batch_size=2, verbose=False, temperature=0.5)
    assert x.shape == (2, 4, 8, 8)
    assert model.model.diffusion_model.got["context"].shape == (2, 3, 8)
    assert [estimate.unique().tolist() for estimate in estimates] == [[0.5]] * 3


def test_noise_can_be_taken_out_of_a_walk(small_model):
    model = latent_model(small_model, 0.5)
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    mean, _, _ = model.p_mean_variance(x_t, None, t, clip_denoised=False)
    torch.testing.assert_close(model.p_sample(x_t, None, t, temperature=0.0), mean)
    torch.testing.assert_close(model.p_sample(x_t, None, t, noise_dropout=1.0), mean)
    x = model.p_sample(x_t.expand(2, -1, -1, -1), None, torch.tensor([5, 5]), repeat_noise=True)
    torch.testing.assert_close(x[0], x[1])


def test_a_score_corrector_edits_what_the_network_says(small_model):
    class Corrector:
        def modify_score(self, model, out, x, t, c, by):
            return out + by

    model = latent_model(small_model, 1.0)
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([0])
    got = model.p_sample(x_t, None, t, score_corrector=Corrector(), corrector_kwargs={"by": 2.0})
    torch.testing.assert_close(got, torch.full((1, 4, 8, 8), 3.0))


def test_estimates_are_quantized_on_request(vq_model):
    vq_model.model.diffusion_model = Recorder(0.01)
    vq_model.parameterization = "x0"
    x_t, t = torch.randn(1, 3, 2, 2), torch.tensor([0])
    got = vq_model.p_sample(x_t, None, t, quantize_denoised=True)
    codes = vq_model.first_stage_model.quantize.embedding.weight
    nearest = codes[(codes - 0.01).square().sum(1).argmin()]
    torch.testing.assert_close(got, nearest.reshape(1, 3, 1, 1).expand(1, 3, 2, 2))


def test_conditions_with_their_own_noise_levels_get_the_noise_of_the_step(small_model):
    model = small_model(num_timesteps_cond=2, linear_end=0.5)
    assert model.cond_ids.tolist() == [0, 9, *[9] * 8]
    torch.manual_seed(0)
    c = model.noised_condition(torch.ones(4000, 1), torch.full((4000,), 1))
    assert c.mean().item() == pytest.approx(model.sqrt_alphas_cumprod[9].item(), abs=0.05)
    with pytest.raises(ConfigError, match="num_timesteps_cond"):
        small_model(num_timesteps_cond=11)


class Controlled(LatentDiffusion):
    """A subclass as ControlNet writes it: a hint in the batch, and a network reached in its own way."""

    @torch.no_grad()
    def get_input(self, batch, k, bs=None, *args, **kwargs):
        x, c = super().get_input(batch, self.first_stage_key, *args, **kwargs)
        return x, {"c_crossattn": [c], "c_concat": [batch["hint"]]}

    def apply_model(self, x_noisy, t, cond, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        text, hint = torch.cat(cond["c_crossattn"], 1), torch.cat(cond["c_concat"], 1)
        return self.model.diffusion_model(x=x_noisy, timesteps=t, context=text) + hint


def test_a_subclass_trains_and_samples_through_its_own_model_call(small_model, batch):
    model = small_model()
    model.__class__ = Controlled
    batch = batch | {"hint": torch.zeros(2, 4, 8, 8)}
    model.shared_step(batch)[0].backward()
    assert model.calls == 1
    _, cond = model.get_input(batch, "image")
    samples, _ = model.sample_log(cond=cond, batch_size=2, ddim=True, ddim_steps=5, eta=0.0)
    assert (samples.shape, model.calls) == ((2, 4, 8, 8), 6)
    samples, _ = model.sample_log(cond=cond, batch_size=2, ddim=False, ddim_steps=None)
    assert (samples.shape, model.calls) == ((2, 4, 8, 8), 16)


def test_uniform_numbers_lie_between_the_two_bounds():
    x = uniform_on_device(3.0, 2.0, (100,), "cpu")
    assert 2.0 <= x.min() < x.max() <= 3.0


# Configuration --------------------------------------------------------------------------------------------------------


def test_keywords_that_nobody_knows_are_all_named(small_model):
    with pytest.raises(ConfigError, match="LatentDiffusion does not know bogus, zeal"):
        small_model(zeal=1, bogus=2)


def test_settings_of_training_forks_are_left_out_with_a_warning(small_model, caplog):
    small_model(personalization_config={"target": "x"}, unet_trainable="attn")
    assert "personalization_config, unet_trainable" in caplog.text


@pytest.mark.parametrize("params, message", [
    ({"parameterization": "score"}, "'score'"),
    ({"loss_type": "l3"}, "'l3'"),
    ({"use_positional_encodings": True}, "never released"),
])  # fmt: skip
def test_values_that_nobody_knows_are_refused(small_model, params, message):
    with pytest.raises(ValueError if "loss_type" in params else ConfigError, match=message):
        small_model(**params)


def test_inference_does_not_import_lightning():
    modules = run_python("import sys; import ldm.models.diffusion.variants; print(*sys.modules)")
    assert not {"pytorch_lightning", "lightning", "torchvision", "cv2", "diffusers"} & set(modules.split())


def test_the_model_is_a_lightning_module_where_lightning_came_first():
    code = ("import pytorch_lightning as pl; from ldm.models.diffusion.ddpm import LatentDiffusion; "
            "print(issubclass(LatentDiffusion, pl.LightningModule))")  # fmt: skip
    assert run_python(code).split()[-1] == "True"


@pytest.mark.parametrize("case", cases("unet"), ids=lambda case: case["name"])
def test_the_network_answers_as_the_original_did_through_apply_model(case):
    model, inputs = tiny_model(case["params"]["model"]), golden("inputs")
    want = {key: value for key, value in golden("unet").items() if key.startswith(case["name"] + "/eps_t")}
    names = case["inputs"]
    x = inputs[names["x"]]
    cond = inputs[names["c"]] if "c" in names else None
    if "c_concat" in names:
        concat = inputs[names["c_concat"]]
        cond = concat if model.model.conditioning_key == "concat" else {"c_concat": [concat], "c_crossattn": [cond]}
    assert want
    for key, array in want.items():
        t = torch.full((len(x),), int(key.rpartition("_t")[2]))
        with torch.no_grad():
            assert_matches(model.apply_model(x, t, cond), array)
