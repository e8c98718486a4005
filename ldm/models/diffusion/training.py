"""What training adds to a diffusion model: the loss, the optimizer, the EMA copy and the hooks that Lightning calls."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from ldm.checkpoint import read_checkpoint
from ldm.errors import ConfigError
from ldm.modules.ema import LitEma
from ldm.util import get_obj_from_str, instantiate_from_config, mean_flat

logger = logging.getLogger(__name__)

# What YAML of textual inversion, DreamBooth, InstructPix2Pix and image variations tells their own training code.
FORK_SETTINGS = frozenset(
    ("embedding_reg_weight", "load_ema", "model_lr", "personalization_config", "reg_weight", "unet_trainable",
     "unfreeze_model")
)  # fmt: skip

Losses = tuple[Tensor, dict[str, Tensor]]  # what is minimised, and its parts by name


def tiled(weight: Tensor, shape: torch.Size) -> Tensor:
    """A weight repeated, or cut, along its first two axes to fill `shape`.

    An input channel that comes n times is divided by n, so that equal inputs give the outputs they gave.
    """
    if weight.shape[2:] != shape[2:] or len(weight.shape) != len(shape):
        raise ConfigError(f"make_it_fit tiles axes 0 and 1 only, not {list(weight.shape)} to {list(shape)}")
    weight = weight[torch.arange(shape[0]) % len(weight)]
    if len(shape) > 1:
        source = torch.arange(shape[1]) % weight.shape[1]
        copies = source.bincount(minlength=weight.shape[1])[source]
        weight = weight[:, source] / copies.reshape(-1, *(1,) * (len(shape) - 2))
    return weight


class Training:
    """The training half of a diffusion model, mixed into a GaussianProcess; `learning_rate` is set from outside."""

    def init_training(
        self,
        loss_type: str = "l2",
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        original_elbo_weight: float = 0.0,
        l_simple_weight: float = 1.0,
        scheduler_config: Mapping | None = None,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        ucg_training: Mapping | None = None,
        min_snr_gamma: float | None = None,
        offset_noise: float = 0.0,
        timestep_density: Mapping[str, float] | None = None,
        optimizer_config: Mapping | None = None,
        trained_guidance: float | None = None,
        **others,
    ) -> None:
        """Keep the training options, and make the EMA copy of `self.model` and the per-step log variance `logvar`.

        ucg_training: {batch key: {"p": probability, "val": what replaces the entry}}, the dropping of conditions that
        classifier-free guidance needs. min_snr_gamma: weight of Hang et al. 2023, off if None. offset_noise: scale of a
        noise shared by all pixels of a channel, so that the mean brightness is learned too. timestep_density: {"mean",
        "std"} for `timesteps_around`, so that the steps where a picture takes shape are seen more often; uniform if
        None. optimizer_config: {"target", "params"} of another optimizer than AdamW. trained_guidance: the guidance
        scale at which a model of captions is trained to be right, 1 if None; see `guided`. Settings of the training
        forks are left out with a warning; ConfigError names every other keyword that is not known.
        """
        unknown = sorted(others.keys() - FORK_SETTINGS)
        if unknown:
            raise ConfigError(f"{type(self).__name__} does not know {', '.join(unknown)}; remove this from its params")
        if others:
            logger.warning("left out, as settings of another project's training: %s", ", ".join(sorted(others)))
        if loss_type not in ("l1", "l2"):
            raise ValueError(f"loss_type must be l1 or l2, got {loss_type!r}")
        self.loss_type = loss_type
        self.monitor = monitor
        self.use_ema = use_ema
        self.original_elbo_weight = original_elbo_weight
        self.l_simple_weight = l_simple_weight
        self.scheduler_config = scheduler_config
        self.use_scheduler = scheduler_config is not None
        self.learn_logvar = learn_logvar
        self.ucg_training = ucg_training or {}
        self.min_snr_gamma = min_snr_gamma
        self.offset_noise = offset_noise
        self.timestep_density = timestep_density
        self.optimizer_config = optimizer_config or {"target": "torch.optim.AdamW"}
        if trained_guidance is not None and self.model.conditioning_key != "crossattn":
            raise ConfigError("trained_guidance is for models with a caption alone, of conditioning_key crossattn")
        self.trained_guidance = trained_guidance
        if use_ema:
            self.model_ema = LitEma(self.model)
        with torch.device("cpu"):
            logvar = torch.full((self.num_timesteps,), float(logvar_init))
        if learn_logvar:
            self.logvar = torch.nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)

    def restart(
        self,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        make_it_fit: bool = False,
        reset_ema: bool = False,
        reset_num_ema_updates: bool = False,
    ) -> None:
        """Begin with the weights of a checkpoint, if one is named, and with the EMA copy begun anew, if asked."""
        self.restarted_from_ckpt = ckpt_path is not None
        self.make_it_fit = make_it_fit
        if (reset_ema or reset_num_ema_updates) and not self.use_ema:
            raise ConfigError("reset_ema and reset_num_ema_updates need use_ema: true")
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)
            if reset_ema:
                self.model_ema = LitEma(self.model)
        if reset_num_ema_updates:
            self.model_ema.reset_num_updates()

    @torch.no_grad()
    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load what fits of a checkpoint into the model, or only into its denoiser; the rest is named in the log.

        ignore_keys: the beginnings of keys to leave out. With make_it_fit, weights of other shapes are tiled to fit.
        """
        weights = read_checkpoint(path)
        weights = {key: weight for key, weight in weights.items() if not key.startswith(tuple(ignore_keys))}
        if only_model:
            weights = {key[len("model."):]: weight for key, weight in weights.items() if key.startswith("model.")}
        module = self.model if only_model else self
        shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
        weights = {key: self.adapted(key, weight, shapes.get(key, weight.shape)) for key, weight in weights.items()}
        missing, unexpected = module.load_state_dict(weights, strict=False)
        logger.info("restored %s: %d keys missing, %d unexpected", path, len(missing), len(unexpected))
        for kind, keys in (("missing", missing), ("unexpected", unexpected)):
            if keys:
                logger.info("%s: %s", kind, ", ".join(keys))

    def adapted(self, key: str, weight: Tensor, shape: torch.Size) -> Tensor:
        """The weight of a checkpoint as this model's `key` takes it."""
        return tiled(weight, shape) if self.make_it_fit and weight.shape != shape else weight

    # ------------------------------------------------------------------------------------------------------- the loss

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Distance of a prediction from its target: their mean, or one value an element if not `mean`."""
        distance = F.l1_loss if self.loss_type == "l1" else F.mse_loss
        return distance(pred, target, reduction="mean" if mean else "none")

    def draw_noise(self, x: Tensor) -> Tensor:
        """Noise to train on, like x (b, c, h, w)."""
        noise = torch.randn_like(x)
        if self.offset_noise:
            noise = noise + self.offset_noise * torch.randn_like(x[:, :, :1, :1])
        return noise

    def draw_timesteps(self, x: Tensor) -> Tensor:
        """One trained timestep for each of a batch, (b,): each as likely as the other, but for `timestep_density`."""
        if self.timestep_density and self.training:
            return self.timesteps_around(len(x), **self.timestep_density)
        return torch.randint(0, self.num_timesteps, (x.shape[0],), device=self.device)

    def timesteps_around(self, n: int, mean: float, std: float) -> Tensor:
        """(n,) timesteps whose share of the way to noise is the sigmoid of a normal (Esser et al. 2024, eq. 19).

        They lie evenly along the normal's quantiles from one random start, so that the mean of a batch varies less
        (Kingma et al. 2021, "Variational Diffusion Models", low-discrepancy sampler).
        """
        quantiles = (torch.arange(n, device=self.device) / n + torch.rand((), device=self.device)) % 1
        share = (mean + std * torch.special.ndtri(quantiles)).sigmoid()
        return (share * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def min_snr_weight(self, t: Tensor) -> Tensor:
        """min(SNR, gamma) as a weight on this parameterization's loss, (b,) (Hang et al. 2023)."""
        snr = self.snr(t)
        capped = snr.clamp(max=self.min_snr_gamma)
        match self.parameterization:
            case "eps":
                return capped / snr
            case "v":
                return capped / (snr + 1)
        return capped

    def diffusion_loss(self, x_start: Tensor, cond, t: Tensor, noise: Tensor | None) -> Losses:
        """The loss of predicting x_start (b, c, h, w) or its noise at t, and its parts by name.

        loss = l_simple_weight * mean(w L / exp(logvar) + logvar) + original_elbo_weight * mean(lvlb_weights L), where L
        is `get_loss` for each of the batch and w the min-SNR weight (Ho et al. 2020, eqs. 12 and 14).
        """
        noise = self.draw_noise(x_start) if noise is None else noise
        noisy = self.q_sample(x_start, t, noise)
        out = self.apply_model(noisy, t, cond)
        if self.training and self.trained_guidance is not None:
            out = self.guided(out, noisy, t)
        loss = mean_flat(self.get_loss(out, self.target(x_start, t, noise), mean=False))

        prefix = "train" if self.training else "val"
        parts = {f"{prefix}/loss_simple": loss.mean()}
        weighted = loss if self.min_snr_gamma is None else self.min_snr_weight(t) * loss
        logvar = self.logvar[t]
        weighted = weighted / logvar.exp() + logvar
        if self.learn_logvar:
            parts |= {f"{prefix}/loss_gamma": weighted.mean(), "logvar": self.logvar.detach().mean()}
        bound = (self.lvlb_weights[t] * loss).mean()
        total = self.l_simple_weight * weighted.mean() + self.original_elbo_weight * bound
        return total, parts | {f"{prefix}/loss_vlb": bound, f"{prefix}/loss": total}

    def guided(self, out: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The prediction `out` led away from that without a condition, by the scale of `trained_guidance`.

        A model whose guided prediction is trained is right at that scale, where others are right at 1 and overdriven,
        and learns to let its two predictions differ by nothing but what the condition says. This is guidance-free
        training with a temperature above 1 (Chen et al. 2025, "Visual Generation Without Guidance"): no gradient flows
        through the prediction without a condition.
        """
        with torch.no_grad():
            empty = self.apply_model(noisy, t, self.get_unconditional_conditioning(len(t), ""))
        return empty + self.trained_guidance * (out - empty)

    # ------------------------------------------------------------------------------------------------ Lightning's hooks

    def training_step(self, batch: MutableMapping, batch_idx: int) -> Tensor:
        """One step of training: the loss of a batch, its parts logged."""
        self.drop_conditions(batch)
        loss, parts = self.shared_step(batch)
        size = len(batch[self.first_stage_key])
        self.log_dict(parts, prog_bar=True, logger=True, on_step=True, on_epoch=True, batch_size=size)
        self.log("global_step", float(self.global_step), prog_bar=True, logger=True, on_step=True, on_epoch=False)
        if self.use_scheduler:
            rate = self.optimizers().param_groups[0]["lr"]
            self.log("lr_abs", rate, prog_bar=True, logger=True, on_step=True, on_epoch=False)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping, batch_idx: int) -> None:
        """Log the loss of a batch twice: with the trained weights, and as `..._ema` with their average."""
        _, parts = self.shared_step(batch)
        with self.ema_scope():
            _, averaged = self.shared_step(batch)
        parts |= {f"{key}_ema": value for key, value in averaged.items()}
        size = len(batch[self.first_stage_key])
        self.log_dict(parts, prog_bar=False, logger=True, on_step=False, on_epoch=True, batch_size=size)

    def on_train_batch_end(self, *args, **kwargs) -> None:
        """Move the EMA copy a step towards the trained weights."""
        if self.use_ema:
            self.model_ema(self.model)

    def drop_conditions(self, batch: MutableMapping) -> None:
        """Replace entries of the batch, in place, by their empty value with the probability that ucg_training gives."""
        for key, rule in self.ucg_training.items():
            empty = "" if rule.get("val") is None else rule["val"]
            for i in (torch.rand(len(batch[key])) < rule["p"]).nonzero().flatten().tolist():
                batch[key][i] = empty

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer changes."""
        return [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]

    def configure_optimizers(self):
        """The optimizer at `self.learning_rate`; with a scheduler_config, its multiplier applied after every step."""
        optimizer_class = get_obj_from_str(self.optimizer_config["target"])
        options = self.optimizer_config.get("params", {})
        optimizer = optimizer_class(self.trained_parameters(), lr=self.learning_rate, **options)
        if not self.use_scheduler:
            return optimizer
        multiplier = instantiate_from_config(self.scheduler_config)
        schedule = {"scheduler": LambdaLR(optimizer, lr_lambda=multiplier.schedule), "interval": "step", "frequency": 1}
        return [optimizer], [schedule]

    @contextlib.contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Work with the averaged weights inside, and with the trained ones again after; nothing without an EMA copy."""
        if not self.use_ema:
            yield
            return
        self.model_ema.store(self.model.parameters())
        self.model_ema.copy_to(self.model)
        if context:
            logger.info("%s: the EMA weights are in place", context)
        try:
            yield
        finally:
            self.model_ema.restore(self.model.parameters())
            if context:
                logger.info("%s: the trained weights are back", context)
