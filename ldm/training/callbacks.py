"""The callbacks that training configs name: folders and configs of the run, pictures, memory and layout."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from ldm.models.diffusion.images import tensor_grid

logger = logging.getLogger(__name__)


class SetupCallback(Callback):
    """Make the folders of a run and write down the configs that it was started with."""

    def __init__(
        self,
        resume: str,
        now: str,
        logdir: str | Path,
        ckptdir: str | Path,
        cfgdir: str | Path,
        config: DictConfig,
        lightning_config: DictConfig,
    ):
        self.resume, self.now = resume, now
        self.logdir, self.ckptdir, self.cfgdir = Path(logdir), Path(ckptdir), Path(cfgdir)
        self.config, self.lightning_config = config, lightning_config

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for folder in (self.logdir, self.ckptdir, self.cfgdir):
            folder.mkdir(parents=True, exist_ok=True)
        lightning = OmegaConf.create({"lightning": self.lightning_config})
        OmegaConf.save(self.config, self.cfgdir / f"{self.now}-project.yaml")
        OmegaConf.save(lightning, self.cfgdir / f"{self.now}-lightning.yaml")


class ImageLogger(Callback):
    """Write what `model.log_images` shows as PNG grids under images/<split>/, and to TensorBoard.

    batch_frequency: in steps, or in batches of the epoch with log_on_batch_idx. increase_log_steps adds the steps 1, 2,
    4 ... below it. clamp keeps pixels in [-1, 1], rescale takes them from there to [0, 1].
    """

    def __init__(
        self,
        batch_frequency: int,
        max_images: int,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: Mapping | None = None,
    ):
        self.batch_freq = batch_frequency
        self.max_images = max_images
        self.clamp, self.rescale = clamp, rescale
        self.disabled = disabled
        self.log_on_batch_idx = log_on_batch_idx
        self.log_first_step = log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self.early = {2**n for n in range(batch_frequency.bit_length())} if increase_log_steps else set()
        self.last = -1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if not self.disabled and (pl_module.global_step > 0 or self.log_first_step):
            self.log_img(pl_module, batch, batch_idx, "train")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int, dataloader_idx=0) -> None:
        if not self.disabled and pl_module.global_step > 0 and batch_idx == 0:
            self.log_img(pl_module, batch, batch_idx, "val")

    def due(self, step: int) -> bool:
        return step % self.batch_freq == 0 or step in self.early

    @rank_zero_only
    @torch.no_grad()
    def log_img(self, pl_module: LightningModule, batch, batch_idx: int, split: str) -> None:
        """Log the pictures of a batch, if it is time: once a step in training, always in validation."""
        step = batch_idx if self.log_on_batch_idx else pl_module.global_step
        if not hasattr(pl_module, "log_images") or (split == "train" and (step == self.last or not self.due(step))):
            return
        if split == "train":
            self.last = step
        training = pl_module.training
        pl_module.eval()
        images = pl_module.log_images(batch, split=split, **self.log_images_kwargs)
        pl_module.train(training)
        for name, image in images.items():
            if isinstance(image, Tensor):
                self.save(pl_module, split, name, self.grid(image), batch_idx)

    def grid(self, image: Tensor) -> Tensor:
        """Images (b, c, h, w) or a grid (c, h, w) as one picture (c, H, W) in [0, 1]."""
        image = image.detach().float().cpu()
        image = tensor_grid(image[:self.max_images], columns=4) if image.ndim == 4 else image
        image = image.clamp(-1.0, 1.0) if self.clamp else image
        return (image + 1.0) / 2.0 if self.rescale else image

    def save(self, pl_module: LightningModule, split: str, name: str, grid: Tensor, batch_idx: int) -> None:
        trainer = pl_module.trainer
        folder = Path(trainer.default_root_dir) / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.rint(grid.clamp(0, 1).numpy() * 255).astype(np.uint8).transpose(1, 2, 0)
        pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
        file = f"{name}_gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}_b-{batch_idx:06}.png"
        Image.fromarray(pixels).save(folder / file.replace("/", "_"))
        for log in trainer.loggers:
            if isinstance(log, TensorBoardLogger):
                log.experiment.add_image(f"{split}/{name}", grid.clamp(0, 1), trainer.global_step)


class CUDACallback(Callback):
    """Log how long each epoch took and, on CUDA, the peak of memory."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.monotonic()  # also where a resumed run begins in the middle of an epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self.began = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds, memory = time.monotonic() - self.began, ""
        if pl_module.device.type == "cuda":
            memory = f", at most {torch.cuda.max_memory_allocated(pl_module.device) / 2**20:,.0f} MiB"
        logger.info("epoch %d took %.1f s%s", trainer.current_epoch, seconds, memory)


class ChannelsLast(Callback):
    """Lay out the convolutions' weights with channels last, which processors and tensor cores prefer."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.to(memory_format=torch.channels_last)
