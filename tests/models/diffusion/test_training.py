import json
import subprocess
import sys

import pytest
import torch
from support import GOLDENS, assert_matches, cases, golden, tiny_model
from torch import nn

from ldm.errors import ConfigError
from ldm.models.diffusion.training import tiled
from ldm.training.muon import Muon

SCHEDULER = {
    "target": "ldm.lr_scheduler.LambdaLinearScheduler",
    "params": {"warm_up_steps": [10], "f_min": [1.0], "f_max": [1.0], "f_start": [0.5], "cycle_lengths": [100]},
}


class Silent(nn.Module):
    """A network that puts out zeros."""

    def forward(self, x, timesteps=None, context=None, y=None):
        return torch.zeros_like(x)


def silent(model):
    model.model.diffusion_model = Silent()
    return model.eval()


def loss_at(model, t: int, fill: float = 2.0):
    """The loss of the zero network on noise (2, 4, 8, 8) that is `fill` everywhere."""
    x = torch.zeros(2, 4, 8, 8)
    return model.p_losses(x, torch.zeros(2, 3, 8), torch.full((2,), t), noise=torch.full_like(x, fill))


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("loss"), ids=lambda case: case["name"])
def test_the_loss_and_its_gradients_are_those_of_the_original(case):
    model, want = tiny_model(case["params"]["model"]), golden("training")
    name = case["name"]
    x_start, c, t, noise = (golden("inputs")[case["inputs"][key]] for key in ("x_start", "c", "t", "noise"))
    loss, parts = model.p_losses(x_start, c, t, noise=noise)
    assert_matches(loss, want[f"{name}/loss"])
    assert_matches(parts["val/loss"], want[f"{name}/loss"])
    assert_matches(parts["val/loss_simple"], want[f"{name}/loss_simple"])
    assert_matches(parts["val/loss_vlb"], want[f"{name}/loss_vlb"])

    parameters = dict(model.model.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters.values())))
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert_matches(total, want[f"{name}/grad_norm_total"])
    for key in case["params"]["grads"]:
        assert_matches(gradients[key].norm(), want[f"{name}/grad_norm:{key}"])


def test_the_loss_is_a_weighted_sum_of_the_simple_loss_and_the_bound(small_model):
    model = silent(small_model(l_simple_weight=0.5, original_elbo_weight=3.0))
    loss, parts = loss_at(model, 4)
    assert parts["val/loss_simple"].item() == 4.0
    torch.testing.assert_close(loss, 0.5 * torch.tensor(4.0) + 3.0 * model.lvlb_weights[4] * 4.0)


def test_the_distance_is_absolute_or_squared(small_model):
    assert loss_at(silent(small_model(loss_type="l1")), 4, fill=-3.0)[0].item() == 3.0
    assert loss_at(silent(small_model(loss_type="l2")), 4, fill=-3.0)[0].item() == 9.0


def test_the_parts_are_called_after_the_mode(small_model):
    model = silent(small_model())
    assert set(loss_at(model, 1)[1]) == {"val/loss", "val/loss_simple", "val/loss_vlb"}
    assert set(loss_at(model.train(), 1)[1]) == {"train/loss", "train/loss_simple", "train/loss_vlb"}


def test_a_distance_put_on_the_instance_is_the_one_that_counts(small_model):
    model = silent(small_model())
    model.get_loss = lambda pred, target, mean=True: torch.full_like(pred, 7.0)
    assert loss_at(model, 4)[0].item() == 7.0


def test_the_learned_variance_divides_the_loss_and_costs_its_logarithm(small_model):
    model = silent(small_model(learn_logvar=True, logvar_init=1.0))
    loss, parts = loss_at(model, 4)
    torch.testing.assert_close(loss, 4.0 / torch.tensor(1.0).exp() + 1.0)
    assert parts["logvar"].item() == 1.0
    loss.backward()
    assert model.logvar.grad[4] != 0
    assert "logvar" in model.state_dict()
    assert "logvar" not in small_model().state_dict()


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_min_snr_weighting_caps_the_weight_that_every_parameterization_puts_on_the_clean_picture(small_model, kind):
    t = torch.arange(10)
    model = small_model(parameterization=kind, min_snr_gamma=5.0)
    snr = model.snr(t)
    # ||eps - eps'||^2 = SNR ||x0 - x0'||^2 and ||v - v'||^2 = (SNR + 1) ||x0 - x0'||^2 at the same x_t.
    per_unit_of_x0 = {"eps": snr, "x0": torch.ones(10), "v": snr + 1}[kind]
    torch.testing.assert_close(model.min_snr_weight(t) * per_unit_of_x0, snr.clamp(max=5.0))


def test_min_snr_weighting_changes_what_is_minimised_and_not_what_is_reported(small_model):
    model = silent(small_model(min_snr_gamma=5.0))
    loss, parts = loss_at(model, 0)
    torch.testing.assert_close(loss, 4.0 * 5.0 / model.snr(torch.tensor(0)))
    assert parts["val/loss_simple"].item() == 4.0


class Told(nn.Module):
    """A network that puts out, everywhere, the first number of its condition times a weight, and its other weight."""

    def __init__(self):
        super().__init__()
        self.heard, self.known = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.25))

    def forward(self, x, timesteps=None, context=None, y=None):
        return (self.heard * context[:, :1, :1, None] + self.known).expand_as(x)


def test_with_a_trained_guidance_the_guided_prediction_is_what_is_trained(small_model):
    model = small_model(trained_guidance=3.0).train()
    model.model.diffusion_model = Told()
    model.get_learned_conditioning = lambda captions: torch.zeros(len(captions), 3, 8)
    noise = torch.full((2, 4, 8, 8), 2.0)
    loss, _ = model.p_losses(torch.zeros_like(noise), torch.ones(2, 3, 8), torch.full((2,), 4), noise=noise)
    torch.testing.assert_close(loss, torch.tensor((0.25 + 3.0 * 0.5 - 2.0) ** 2))
    loss.backward()
    network = model.model.diffusion_model
    # The prediction without a condition, 0.25, is held: what moves is its difference from the other, three times over.
    torch.testing.assert_close(network.heard.grad, torch.tensor(2 * (0.25 + 1.5 - 2.0) * 3.0))
    torch.testing.assert_close(network.known.grad, network.heard.grad)
    loss, _ = model.eval().p_losses(torch.zeros_like(noise), torch.ones(2, 3, 8), torch.full((2,), 4), noise=noise)
    torch.testing.assert_close(loss, torch.tensor((0.25 + 0.5 - 2.0) ** 2))


def test_guidance_is_trained_for_captions_alone(small_model):
    with pytest.raises(ConfigError, match="trained_guidance is for models with a caption alone"):
        small_model(trained_guidance=3.0, conditioning_key="concat")


def test_a_timestep_density_prefers_the_steps_around_its_mean_in_training_alone(small_model):
    torch.manual_seed(0)
    model, many = small_model(timesteps=1000, timestep_density={"mean": 0.0, "std": 0.5}), torch.zeros(2000, 1, 1, 1)
    drawn = model.train().draw_timesteps(many) / model.num_timesteps
    assert abs(drawn.mean() - 0.5) < 0.02
    within = ((drawn > torch.tensor(-0.5).sigmoid()) & (drawn < torch.tensor(0.5).sigmoid())).float().mean()
    assert abs(within - 0.683) < 0.05  # one standard deviation of the normal
    assert abs((model.eval().draw_timesteps(many) / model.num_timesteps).std() - 12**-0.5) < 0.02


def test_offset_noise_is_shared_by_the_pixels_of_a_channel(small_model):
    x = torch.zeros(200, 4, 8, 8)
    means = [small_model(offset_noise=scale).draw_noise(x).mean(dim=(2, 3)).std().item() for scale in (0.0, 0.5)]
    assert means[0] == pytest.approx(1 / 8, rel=0.1)
    assert means[1] == pytest.approx((1 / 64 + 0.25) ** 0.5, rel=0.1)


def test_every_timestep_is_drawn(small_model):
    t = small_model().draw_timesteps(torch.zeros(500, 1))
    assert t.unique().tolist() == list(range(10))


# The optimizer --------------------------------------------------------------------------------------------------------


def test_the_optimizer_trains_the_network_alone(small_model):
    model = small_model()
    model.learning_rate = 3e-4
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == 3e-4
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.model.parameters()}


def test_a_configuration_may_name_another_optimizer(small_model):
    model = small_model(optimizer_config={"target": "ldm.training.muon.Muon", "params": {"rms": 0.5}})
    model.learning_rate = 3e-4
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, Muon)
    assert (optimizer.param_groups[0]["lr"], optimizer.rms) == (3e-4, 0.5)


def test_the_optimizer_also_trains_what_the_configuration_sets_free(small_model):
    stage = {"target": "torch.nn.Linear", "params": {"in_features": 8, "out_features": 8}}
    model = small_model(learn_logvar=True, cond_stage_trainable=True, cond_stage_config=stage)
    trained = {id(p) for p in model.trained_parameters()}
    assert id(model.logvar) in trained
    assert id(model.cond_stage_model.weight) in trained


def test_the_scheduler_multiplies_the_rate_after_every_step(small_model):
    model = small_model(scheduler_config=SCHEDULER)
    model.learning_rate = 0.1
    (optimizer,), (schedule,) = model.configure_optimizers()
    assert (schedule["interval"], schedule["frequency"]) == ("step", 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    optimizer.step()
    schedule["scheduler"].step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.055)


# The average of the weights -------------------------------------------------------------------------------------------


def shift(model, by: float) -> None:
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter += by


def test_each_batch_moves_the_average_towards_the_weights(small_model):
    model = small_model(use_ema=True)
    weight = model.model.diffusion_model.out[2].bias
    start = weight.detach().clone()
    shift(model, 1.0)
    model.on_train_batch_end(None, None, 0)
    with model.ema_scope():
        torch.testing.assert_close(weight.detach(), start + 1 - 2 / 11)
    torch.testing.assert_close(weight.detach(), start + 1)


def test_the_weights_come_back_after_an_error_too(small_model):
    model = small_model(use_ema=True)
    shift(model, 1.0)
    trained = model.model.diffusion_model.out[2].bias.detach().clone()
    with pytest.raises(KeyError), model.ema_scope("sampling"):
        raise KeyError
    torch.testing.assert_close(model.model.diffusion_model.out[2].bias.detach(), trained)


def test_without_an_average_the_scope_changes_nothing(small_model):
    model = small_model()
    before = model.model.diffusion_model.out[2].bias.detach().clone()
    with model.ema_scope():
        torch.testing.assert_close(model.model.diffusion_model.out[2].bias.detach(), before)
    assert not hasattr(model, "model_ema")


# Hooks ----------------------------------------------------------------------------------------------------------------


def test_conditions_are_dropped_with_their_probability(small_model):
    model = small_model(ucg_training={"txt": {"p": 0.25, "val": None}, "hint": {"p": 1.0, "val": 9}})
    texts = ["a cat"] * 2000
    model.drop_conditions({"txt": texts, "hint": torch.zeros(3)})
    assert texts.count("") / 2000 == pytest.approx(0.25, abs=0.05)
    hint = torch.zeros(3)
    model.drop_conditions({"txt": ["a cat"], "hint": hint})
    assert hint.tolist() == [9.0, 9.0, 9.0]


def test_the_first_batch_sets_the_scale_of_the_latents(small_model, batch):
    model = small_model(scale_by_std=True)
    model.on_train_batch_start(batch, 0)
    torch.testing.assert_close(model.scale_factor, 1 / batch["image"].std())
    assert "scale_factor" in model.state_dict()
    torch.testing.assert_close(model.get_input(batch, "image")[0].std(), torch.tensor(1.0))


def test_later_batches_and_restarted_models_keep_their_scale(small_model, batch):
    model = small_model(scale_by_std=True)
    model.on_train_batch_start(batch, 1)
    assert model.scale_factor == 1.0
    model.restarted_from_ckpt = True
    model.on_train_batch_start(batch, 0)
    assert model.scale_factor == 1.0


def test_a_scale_that_is_set_is_not_measured_over(small_model, batch):
    with pytest.raises(ConfigError, match="leave it at 1"):
        small_model(scale_by_std=True, scale_factor=0.5).on_train_batch_start(batch, 0)


# Starting weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(small_model, tmp_path):
    """A model whose weights are all 1 with an average of 2, and its file."""
    model = small_model(use_ema=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        for shadow in model.model_ema.buffers():
            shadow.fill_(2)
    path = tmp_path / "start.ckpt"
    torch.save({"state_dict": model.state_dict()}, path)
    return str(path)


def bias(model):
    return model.model.diffusion_model.out[2].bias.detach().unique().tolist()


def test_a_model_begins_with_the_weights_of_a_checkpoint(small_model, saved):
    model = small_model(use_ema=True, ckpt_path=saved)
    assert bias(model) == [1.0]
    assert model.restarted_from_ckpt
    with model.ema_scope():
        assert bias(model) == [2.0]


def test_keys_can_be_left_out_of_a_checkpoint(small_model, saved):
    fresh = bias(small_model())
    assert bias(small_model(ckpt_path=saved, ignore_keys=["model.diffusion_model.out"])) == fresh


def test_the_network_alone_can_be_loaded(small_model, saved):
    model = small_model(use_ema=True, ckpt_path=saved, load_only_unet=True)
    assert bias(model) == [1.0]
    with model.ema_scope():
        assert bias(model) != [2.0]


def test_the_average_can_begin_anew_from_a_checkpoint(small_model, saved):
    model = small_model(use_ema=True, ckpt_path=saved, reset_ema=True, reset_num_ema_updates=True)
    with model.ema_scope():
        assert bias(model) == [1.0]
    assert model.model_ema.num_updates == 0
    with pytest.raises(ConfigError, match="use_ema"):
        small_model(ckpt_path=saved, reset_ema=True)


def test_weights_of_another_shape_are_tiled_on_request(small_model, saved):
    model = small_model(ckpt_path=saved, unet={"in_channels": 9}, make_it_fit=True)
    convolution = model.model.diffusion_model.input_blocks[0][0].weight
    assert convolution.shape[1] == 9
    torch.testing.assert_close(convolution.sum(dim=1), torch.full((32, 3, 3), 4.0))
    with pytest.raises(RuntimeError, match="size mismatch"):
        small_model(ckpt_path=saved, unet={"in_channels": 9})


def test_tiling_keeps_what_a_layer_says_of_repeated_inputs():
    weight, x = torch.randn(3, 4), torch.randn(4)
    wide = tiled(weight, torch.Size([6, 9]))
    torch.testing.assert_close(wide @ x[torch.arange(9) % 4], (weight @ x).repeat(2))
    with pytest.raises(ConfigError, match="axes 0 and 1"):
        tiled(weight, torch.Size([3, 4, 1]))


# A whole training -----------------------------------------------------------------------------------------------------

TRAIN = """
import json, sys, warnings
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset
from ldm.util import instantiate_from_config

warnings.filterwarnings("error", message=".*(ambiguous|needs to be floating|optimizer.step).*")
torch.set_num_threads(1)
pl.seed_everything(0, verbose=False)

class Pictures(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        numbers = torch.Generator().manual_seed(i)
        picture = torch.linspace(-1, 1, 64)[:, None, None].expand(64, 64, 3) * (1 if i % 2 else -1)
        return {"jpg": picture, "txt": torch.randn(77, 64, generator=numbers)}

section = OmegaConf.load(sys.argv[1]).model
section.params.update(json.loads(sys.argv[2]))
model = instantiate_from_config(section)
model.learning_rate = 1e-3
weight = model.model.diffusion_model.out[2].weight
start = weight.detach().clone()
ema = dict(model.model_ema.named_buffers())["diffusion_modelout2weight"]

class Losses(pl.Callback):
    seen = []
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(float(trainer.callback_metrics["train/loss_simple_step"]))

trainer = pl.Trainer(max_epochs=9, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[Losses()],
                     enable_progress_bar=False, enable_model_summary=False, check_val_every_n_epoch=9)
trainer.fit(model, DataLoader(Pictures(), 4), DataLoader(Pictures(), 4))
metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
print(json.dumps({
    "lightning": isinstance(model, pl.LightningModule), "losses": Losses.seen, "metrics": metrics,
    "rate": model.optimizers().param_groups[0]["lr"], "updates": int(model.model_ema.num_updates),
    "moved": float((weight - start).norm()), "ema_moved": float((ema - start).norm()),
}))
"""


@pytest.fixture(scope="module")
def training() -> dict:
    """What 18 steps of Lightning's Trainer made of the tiny model."""
    changes = json.dumps({"use_ema": True, "scheduler_config": SCHEDULER})
    command = [sys.executable, "-c", TRAIN, str(GOLDENS / "tiny.yaml"), changes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_training_lowers_the_loss(training):
    losses = training["losses"]
    assert training["lightning"]
    assert len(losses) == 18
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_training_updates_the_average_once_a_step(training):
    assert training["updates"] == 18
    assert training["moved"] > training["ema_moved"] > 0


def test_training_steps_the_rate_and_logs_it(training):
    assert training["rate"] == pytest.approx(1e-3)
    assert training["metrics"]["lr_abs"] == pytest.approx(1e-3)
    assert training["metrics"]["global_step"] == 17


def test_validation_logs_the_loss_of_the_weights_and_of_their_average(training):
    assert {"val/loss_simple", "val/loss_simple_ema", "val/loss_vlb_ema", "val/loss_ema"} <= training["metrics"].keys()
