import importlib.util
import subprocess
import sys
import textwrap

import fill
import pytest
import torch
from omegaconf import OmegaConf
from support import GOLDENS, assert_matches, cases, golden, manifest

from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel, VQModelInterface

IDENTITY = {"target": "torch.nn.Identity"}
TINY = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
KL_LOSS = {
    "target": "ldm.modules.losses.LPIPSWithDiscriminator",
    "params": {"disc_start": 0, "perceptual_weight": 0, "kl_weight": 1e-6, "disc_num_layers": 1},
}
VQ_LOSS = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "params": {"disc_start": 0, "perceptual_weight": 0, "disc_num_layers": 1},
}


def published(ch_mult) -> dict:
    sizes = {"double_z": True, "z_channels": 4, "resolution": 256, "ch": 128, "ch_mult": ch_mult, "num_res_blocks": 2}
    return TINY | sizes


def kl(**options) -> AutoencoderKL:
    return fill.fill_module(AutoencoderKL(TINY | {"double_z": True}, IDENTITY, 3, **options).eval())


def vq(kind=VQModel, **options) -> VQModel:
    return fill.fill_module(kind(ddconfig=TINY, lossconfig=IDENTITY, n_embed=16, embed_dim=3, **options).eval())


@pytest.mark.parametrize(
    ("name", "ch_mult"),
    [("sd-v1", [1, 2, 4, 4]), ("sdxl-base", [1, 2, 4, 4]), ("ldm-txt2img-1p4B", [1, 2, 4, 4]),
     ("sd-x4-upscaler", [1, 2, 4])],
)
def test_the_state_dict_has_the_keys_and_shapes_of_the_published_checkpoint(name, ch_mult):
    with torch.device("meta"):
        model = AutoencoderKL(OmegaConf.create(published(ch_mult)), OmegaConf.create(IDENTITY), 4)
    prefix = "first_stage_model."
    wanted = {key.removeprefix(prefix): shape for key, (shape, _) in manifest(name).items() if key.startswith(prefix)}
    assert {key: tuple(weight.shape) for key, weight in model.state_dict().items()} == wanted


def test_the_number_of_parameters_is_the_published_one():
    with torch.device("meta"):
        model = AutoencoderKL(published([1, 2, 4, 4]), IDENTITY, 4)
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_653_863


@pytest.mark.parametrize("case", cases("vae"), ids=lambda case: case["name"])
def test_latents_and_pictures_are_those_of_the_original(case):
    arrays, wanted, name = golden("inputs"), golden(case["file"]), case["name"]
    config = OmegaConf.load(GOLDENS / f"{case['params']['model']}.yaml").model.params
    model = AutoencoderKL(**config.first_stage_config.params).eval()
    fill.fill_module(model, prefix="first_stage_model.")
    with torch.no_grad():
        posterior = model.encode(arrays[case["inputs"]["image"]])
        for part in ("mean", "logvar", "std"):
            assert_matches(getattr(posterior, part), wanted[f"{name}/{part}"])
        torch.manual_seed(case["params"]["seed"])
        assert_matches(config.scale_factor * posterior.sample(), wanted[f"{name}/z_sample"])
        if "z" in case["inputs"]:
            picture = model.decode(arrays[case["inputs"]["z"]] / config.scale_factor)
            assert_matches(picture, wanted[f"{name}/decoded"])


def test_half_precision_weights_take_and_give_float32():
    model, x = kl(), torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        want = model.decode(model.encode(x).mode())
        model.to(torch.bfloat16)
        posterior = model.encode(x)
        got = model.decode(posterior.mode())
    assert posterior.mean.dtype == got.dtype == torch.float32
    assert_matches(got, want, 5e-2)


def test_a_posterior_needs_a_mean_and_a_variance():
    with pytest.raises(ValueError, match="double_z"):
        AutoencoderKL(TINY, IDENTITY, 3)


def test_a_codebook_model_decodes_the_codes_that_it_encodes():
    model, x = vq(sane_index_shape=True), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        quantised, _, (_, _, ids) = model.encode(x)
        picture, _ = model(x)
        torch.testing.assert_close(model.decode(quantised), picture)
        torch.testing.assert_close(model.decode_code(ids), picture)
    assert ids.shape == (1, 16, 16)
    assert "quantize.embedding.weight" in model.state_dict()


def test_as_a_first_stage_the_codebook_is_applied_when_decoding():
    whole, stage, x = vq(), vq(VQModelInterface), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        latent = stage.encode(x)
        assert torch.equal(latent, whole.encode_to_prequant(x))
        torch.testing.assert_close(stage.decode(latent), whole(x)[0])
        assert not torch.allclose(stage.decode(latent, force_not_quantize=True), whole(x)[0])


def test_the_identity_stage_hands_pictures_through():
    x = torch.randn(1, 3, 4, 4)
    assert IdentityFirstStage().decode(IdentityFirstStage(1, a=2).encode(x)) is x
    assert IdentityFirstStage(vq_interface=True).quantize(x) == (x, None, [None, None, None])


def test_of_a_diffusion_model_s_checkpoint_the_first_stage_is_taken(tmp_path):
    source = kl()
    weights = {f"first_stage_model.{key}": weight for key, weight in source.state_dict().items()}
    torch.save({"state_dict": {**weights, "model.diffusion_model.out.2.bias": torch.ones(4)}}, tmp_path / "model.ckpt")
    model = AutoencoderKL(TINY | {"double_z": True}, IDENTITY, 3, str(tmp_path / "model.ckpt"))
    for key, weight in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], weight)


def test_weights_come_from_a_checkpoint_but_for_the_ignored(tmp_path):
    source = kl()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "model.ckpt")
    model = AutoencoderKL(TINY | {"double_z": True}, IDENTITY, 3, str(tmp_path / "model.ckpt"), ["decoder.", "quant"])
    assert torch.equal(model.encoder.conv_in.weight, source.encoder.conv_in.weight)
    assert not torch.equal(model.decoder.conv_in.weight, source.decoder.conv_in.weight)
    assert not torch.equal(model.quant_conv.weight, source.quant_conv.weight)


def test_a_model_on_meta_becomes_real_by_its_checkpoint(tmp_path):
    source = kl()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "model.ckpt")
    with torch.device("meta"):
        model = AutoencoderKL(TINY | {"double_z": True}, IDENTITY, 3, str(tmp_path / "model.ckpt"))
    assert torch.equal(model.decoder.conv_in.weight, source.decoder.conv_in.weight)


def test_averaged_weights_hold_inside_of_their_scope_only():
    model = kl(ema_decay=0.5)
    before, average = model.quant_conv.weight.clone(), model.model_ema.quant_convweight
    with pytest.raises(RuntimeError, match="inside"), model.ema_scope():
        assert torch.equal(model.quant_conv.weight, average)
        raise RuntimeError("inside")
    assert torch.equal(model.quant_conv.weight, before)
    assert not torch.equal(before, average)


def test_pictures_to_look_at_have_three_channels():
    batch = {"image": torch.rand(2, 32, 32, 3)}
    images = kl(ema_decay=0.5).log_images(batch, log_ema=True)
    assert set(images) == {"inputs", "reconstructions", "samples", "reconstructions_ema", "samples_ema"}
    assert all(image.shape == (2, 3, 32, 32) for image in images.values())
    assert set(vq().log_images(batch)) == {"inputs", "reconstructions"}
    assert set(kl().log_images(batch, only_inputs=True)) == {"inputs"}


def test_maps_of_many_channels_are_shown_in_colour():
    model = kl(colorize_nlabels=5)
    shown = model.to_rgb(torch.randn(2, 5, 8, 8))
    assert shown.shape == (2, 3, 8, 8)
    assert shown.min() == -1
    assert shown.max() == 1


def test_a_batch_becomes_channels_first_float32():
    model = kl()
    assert model.get_input({"image": torch.zeros(2, 8, 6, 3, dtype=torch.uint8)}, "image").shape == (2, 3, 8, 6)
    single = model.get_input({"image": torch.zeros(2, 8, 6)}, "image")
    assert single.shape == (2, 1, 8, 6)
    assert single.dtype == torch.float32


def test_batches_are_resized_within_the_range_after_the_first_at_its_largest():
    model, batch = vq(batch_resize_range=(16, 48)), {"image": torch.rand(1, 32, 32, 3)}
    assert model.get_input(batch, "image").shape[2] == 48
    model.global_step = 100
    sides = {model.get_input(batch, "image").shape[2] for _ in range(40)}
    assert sides == {16, 32, 48}


def test_the_optimizers_share_out_the_parameters():
    model = AutoencoderKL(TINY | {"double_z": True}, KL_LOSS, 3, learn_logvar=True)
    model.learning_rate = 1e-3
    (autoencoder, discriminator), schedules = model.configure_optimizers()
    both = [p for group in autoencoder.param_groups + discriminator.param_groups for p in group["params"]]
    assert {id(p) for p in both} == {id(p) for p in model.parameters()}
    assert len(both) == len({id(p) for p in both})
    assert schedules == []


def test_a_codebook_model_has_a_schedule_for_each_optimizer():
    warm_up = {"warm_up_steps": [2], "f_min": [1.0], "f_max": [1.0], "f_start": [0.5], "cycle_lengths": [99]}
    schedule = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": warm_up}
    model = VQModel(TINY, VQ_LOSS, 16, 3, scheduler_config=schedule, lr_g_factor=2.0)
    model.learning_rate = 0.1
    optimizers, schedules = model.configure_optimizers()
    assert [round(o.param_groups[0]["lr"], 6) for o in optimizers] == [0.1, 0.05]
    assert all(entry["interval"] == "step" for entry in schedules)


TRAINING = textwrap.dedent("""
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader

    from ldm.models.autoencoder import AutoencoderKL, VQModel

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return {"image": torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(i)) * 2 - 1}

    def train(model):
        model.learning_rate, model.accumulate_grad_batches = 1e-3, 2
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                             enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(model, DataLoader(Pictures(), batch_size=2), DataLoader(Pictures(), batch_size=2))
        after = dict(model.named_parameters())
        moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
        finite = all(p.isfinite().all() for p in after.values())
        rec_loss = trainer.callback_metrics["val/rec_loss"].isfinite().item()
        print("RESULT", trainer.global_step, *sorted(moved), finite, rec_loss)

    torch.manual_seed(0)
    ddconfig, kl_loss, vq_loss = CONFIGS
    train(AutoencoderKL(ddconfig | {"double_z": True}, kl_loss, 3, learn_logvar=True, ema_decay=0.9))
    train(VQModel(ddconfig, vq_loss, 16, 3))
""")


@pytest.mark.skipif(importlib.util.find_spec("pytorch_lightning") is None, reason="needs the train extra")
def test_lightning_trains_autoencoder_and_discriminator_in_turn():
    code = TRAINING.replace("CONFIGS", repr((TINY, KL_LOSS, VQ_LOSS)))
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    # Three batches, two of them to an update and the last alone: two updates of two optimizers.
    assert [line for line in run.stdout.splitlines() if line.startswith("RESULT")] == [
        "RESULT 4 decoder encoder loss post_quant_conv quant_conv True True",
        "RESULT 4 decoder encoder loss post_quant_conv quant_conv quantize True True",
    ]
