"""The pictures that a training run logs: what goes in, how noise covers it, and what the model makes of noise."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.models.diffusion.stages import CLASS_KEYS, TEXT_KEYS
from ldm.util import isimage, ismap, log_txt_as_img


def tensor_grid(images: Tensor, columns: int, padding: int = 2) -> Tensor:
    """Images (n, c, h, w) on one canvas (c, H, W), row by row, with a border of zeros around each."""
    count = len(images)
    columns = min(columns, count)
    rows = -(-count // columns)
    cells = F.pad(images, (padding, 0, padding, 0, 0, 0, 0, rows * columns - count))
    canvas = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    return F.pad(canvas, (0, padding, 0, padding))


def rows_of(stages: Sequence[Tensor]) -> Tensor:
    """A grid with a row an image and a column a stage, from n stages of images (b, c, h, w)."""
    return tensor_grid(torch.stack(list(stages), dim=1).flatten(0, 1), columns=len(stages))


def chosen(log: dict[str, Tensor], keys: Sequence[str] | None) -> dict[str, Tensor]:
    """The entries asked for, or all where none of them is there."""
    return {key: log[key] for key in keys or () if key in log} or log


class ImageLog:
    """Pictures of a diffusion model of images."""

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping,
        N: int = 8,
        n_row: int = 2,
        sample: bool = True,
        return_keys: Sequence[str] | None = None,
        **kwargs,
    ) -> dict[str, Tensor]:
        """Inputs, noised inputs, samples and the way to them, by name: (n, c, h, w) or grids (c, h, w) in [-1, 1]."""
        x = self.get_input(batch, self.first_stage_key)[:N].to(self.device)
        log = {"inputs": x, "diffusion_row": rows_of(self.noised(x[:n_row]))}
        if sample:
            with self.ema_scope("Plotting"):
                log["samples"], stages = self.sample(len(x), return_intermediates=True)
            log["denoise_row"] = self._get_rows_from_list(stages)
        return chosen(log, return_keys)

    def _get_rows_from_list(self, samples: Sequence[Tensor]) -> Tensor:
        return rows_of(samples)

    def noised(self, x: Tensor) -> list[Tensor]:
        """x (b, c, h, w) as it looks every log_every_t steps, and at the last."""
        steps = sorted({*range(0, self.num_timesteps, self.log_every_t), self.num_timesteps - 1})
        return [self.q_sample(x, torch.full((len(x),), t, device=x.device)) for t in steps]


class LatentImageLog(ImageLog):
    """Pictures of a diffusion model of latents."""

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping,
        N: int = 8,
        n_row: int = 4,
        sample: bool = True,
        ddim_steps: int | None = 200,
        ddim_eta: float = 1.0,
        return_keys: Sequence[str] | None = None,
        quantize_denoised: bool = True,
        inpaint: bool = True,
        plot_denoise_rows: bool = False,
        plot_progressive_rows: bool = True,
        plot_diffusion_rows: bool = True,
        unconditional_guidance_scale: float = 1.0,
        unconditional_guidance_label=None,
        use_ema_scope: bool = True,
        **kwargs,
    ) -> dict[str, Tensor]:
        """Inputs, reconstructions, conditions and samples of up to N entries of a batch, by name.

        (n, c, h, w) or grids (c, h, w), about [-1, 1]. ddim_steps None samples by all the ancestral steps. Samples come
        guided as well if the scale is over 1, and quantised if the autoencoder is a VQ; `inpaint` redraws the middle of
        each input and then its surroundings.
        """
        scope = self.ema_scope if use_ema_scope else lambda context: nullcontext()
        z, c, x, reconstruction, raw = self.get_input(
            batch, self.first_stage_key, return_first_stage_outputs=True, force_c_encode=True,
            return_original_cond=True, bs=N,
        )  # fmt: skip
        count = len(x)
        log = {"inputs": x, "reconstruction": reconstruction, **self.condition_images(batch, c, raw, x)}
        if plot_diffusion_rows:
            log["diffusion_row"] = self._get_denoise_row_from_list(self.noised(z[:n_row]))

        def draw(context: str, **options) -> tuple[Tensor, list[Tensor]]:
            """Decoded samples, and the latents on the way to them."""
            with scope(context):
                ddim = ddim_steps is not None
                samples, stages = self.sample_log(c, count, ddim, ddim_steps, eta=ddim_eta, **options)
            return self.decode_first_stage(samples), stages["pred_x0"] if isinstance(stages, Mapping) else stages

        if sample:
            log["samples"], stages = draw("Sampling")
            if plot_denoise_rows:
                log["denoise_row"] = self._get_denoise_row_from_list(stages)
            if quantize_denoised and hasattr(getattr(self.first_stage_model, "quantize", None), "embedding"):
                flag = "quantize_denoised" if ddim_steps is None else "quantize_x0"
                log["samples_x0_quantized"], _ = draw("Sampling quantized", **{flag: True})
        if sample and unconditional_guidance_scale > 1.0:
            scale = unconditional_guidance_scale
            uncond = self.get_unconditional_conditioning(count, unconditional_guidance_label)
            if isinstance(c, Mapping):
                uncond = {**c, "c_crossattn": [uncond]}
            guidance = {"unconditional_guidance_scale": scale, "unconditional_conditioning": uncond}
            log[f"samples_cfg_scale_{scale:.2f}"], _ = draw("Sampling with guidance", **guidance)
        if inpaint:
            height, width = z.shape[2:]
            keep = z.new_ones(count, 1, height, width)
            keep[:, :, height // 4:3 * height // 4, width // 4:3 * width // 4] = 0.0
            log["samples_inpainting"], _ = draw("Plotting inpainting", x0=z, mask=keep)
            log["samples_outpainting"], _ = draw("Plotting outpainting", x0=z, mask=1.0 - keep)
            log["mask"] = keep
        if plot_progressive_rows:
            with scope("Plotting progressives"):
                shape = (self.channels, self.image_size, self.image_size)
                _, stages = self.progressive_denoising(c, shape=shape, batch_size=count)
            log["progressive_row"] = self._get_denoise_row_from_list(stages)
        return chosen(log, return_keys)

    def condition_images(self, batch: Mapping, c, raw, x: Tensor) -> dict[str, Tensor]:
        """What the model was told, as pictures the size of x (n, 3, h, w)."""
        key, stage = self.cond_stage_key, self.cond_stage_model
        height, width = x.shape[2:]
        words = batch.get("human_label") if key in CLASS_KEYS else batch[key] if key in TEXT_KEYS else None
        if self.model.conditioning_key is None:
            return {}
        if hasattr(stage, "decode"):
            return {"conditioning": stage.decode(c)}
        if words is not None and isinstance(words[0], str):
            pictures = log_txt_as_img((width, height), words[:len(x)], size=max(height // 25, 8))
            return {"conditioning": pictures.to(x.device)}
        if isimage(raw):
            return {"conditioning": raw}
        return {"original_conditioning": self.to_rgb(raw)} if ismap(raw) else {}

    def _get_denoise_row_from_list(
        self, samples: Sequence[Tensor], desc: str = "", force_no_decoder_quantization: bool = False
    ) -> Tensor:
        """Latents on their way, decoded: a grid with a row an image and a column a stage."""
        stages = (z.to(self.device) for z in samples)
        return rows_of([self.decode_first_stage(z, force_not_quantize=force_no_decoder_quantization) for z in stages])

    def to_rgb(self, x: Tensor) -> Tensor:
        """A map (b, c, h, w) of any channels as colours (b, 3, h, w) in [-1, 1], by a fixed random mixture."""
        weight = torch.randn(3, x.shape[1], 1, 1, generator=torch.Generator().manual_seed(0))
        x = F.conv2d(x.float(), weight.to(x.device))
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0
