"""Stable Diffusion XL (Podell et al. 2023) as Stability AI's configs describe it, run as any latent diffusion model."""

from collections.abc import Mapping
from typing import Any

from ldm.errors import ConfigError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.stages import frozen
from ldm.util import instantiate_from_config

# What these configs say of training, of their own samplers, and of mixed precision.
NOT_USED = frozenset(
    ("compile_model", "disable_first_stage_autocast", "ema_decay_rate", "en_and_decode_n_samples_a_time", "log_keys",
     "loss_fn_config", "network_wrapper", "no_cond_log", "optimizer_config", "sampler_config")
)  # fmt: skip


class DiffusionEngine(LatentDiffusion):
    """A latent diffusion model in the words of the `sgm` package: its `conditioner` is the cond stage.

    A condition is {"c_crossattn": [states (b, n, c)], "c_adm": vector (b, d)}. Checkpoints carry no schedule but
    `denoiser.sigmas`. image_size, in latents, is 128 where a config is silent: 1024 pixels.
    """

    saves_schedule = False

    def __init__(
        self,
        network_config: Mapping,
        denoiser_config: Mapping,
        conditioner_config: Mapping,
        first_stage_config: Mapping,
        input_key: str = "jpg",
        image_size: int = 128,
        channels: int = 4,
        use_ema: bool = False,
        **kwargs: Any,
    ):
        denoiser = instantiate_from_config(denoiser_config)
        super().__init__(
            first_stage_config, conditioner_config, unet_config=network_config, conditioning_key="crossattn-adm",
            cond_stage_key="txt", first_stage_key=input_key, image_size=image_size, channels=channels,
            parameterization=denoiser.parameterization, given_betas=denoiser.betas, use_ema=use_ema,
            **{name: value for name, value in kwargs.items() if name not in NOT_USED},
        )  # fmt: skip
        self.denoiser = denoiser

    @property
    def cond_stage_model(self):
        return self.conditioner

    @cond_stage_model.setter
    def cond_stage_model(self, stage: None) -> None:
        """There is none until `instantiate_cond_stage`."""
        self.conditioner = stage

    def instantiate_cond_stage(self, config: Mapping) -> None:
        self.conditioner = frozen(instantiate_from_config(config))

    def get_learned_conditioning(self, c):
        """What texts tell by themselves, or a batch with all that the conditioner reads."""
        return self.conditioner(c) if isinstance(c, Mapping) else self.conditioner.encode(c)

    def shared_step(self, batch: Mapping, **kwargs):
        raise ConfigError("Stable Diffusion XL is run here, not trained: train with a config of LatentDiffusion")
