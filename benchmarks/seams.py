"""How far Stable Diffusion 1's autoencoder in the bands of --memory lowest is from decoding a picture whole.

  python benchmarks/seams.py --side 512 --precision bf16

The weights are random ones of full size, the latents random too, the colours spread as in a picture. A seam would be a
row of pixels that is further off than the others.
"""

import argparse
import time

import torch
from omegaconf import OmegaConf

from ldm.config import load_config, model_section
from ldm.generation.options import REPOSITORY
from ldm.memory import DTYPES, SAVINGS
from ldm.modules.bands import set_band
from ldm.util import instantiate_from_config


def random_autoencoder(dtype: torch.dtype) -> torch.nn.Module:
    """The autoencoder of Stable Diffusion 1, with weights of a size that keeps the numbers finite."""
    section = model_section(load_config(REPOSITORY / "configs/stable-diffusion/v1-inference.yaml"), "v1-inference.yaml")
    config = OmegaConf.to_container(section.params.first_stage_config, resolve=True)
    config["params"] |= {"lossconfig": {"target": "torch.nn.Identity"}}
    model = instantiate_from_config(OmegaConf.create(config)).eval().requires_grad_(False)
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.uniform_(-1, 1).mul_((3 / weight[0].numel()) ** 0.5)
    return model.to(dtype).to(memory_format=torch.channels_last)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, metavar="PIXELS")
    parser.add_argument("--precision", choices=("full", "bf16", "fp16"), default="bf16")
    args = parser.parse_args()
    dtype = DTYPES[args.precision]
    model, drawn = random_autoencoder(dtype), []
    latents = torch.randn(1, model.embed_dim, args.side // 8, args.side // 8).to(dtype)
    for band in (1 << 62, SAVINGS["lowest"].band):
        set_band(band)
        begun = time.process_time()
        drawn.append(model.decode(latents).float())
        print(f"{'whole' if len(drawn) == 1 else 'in bands'}: {time.process_time() - begun:.0f} s of processor time")
    spread = 2 * drawn[0].std()
    whole, banded = (127.5 * (1 + (one / spread).clamp(-1, 1)) for one in drawn)
    apart = (whole - banded).abs()
    rows = apart.mean(dim=(0, 1, 3))
    print(f"{args.side}x{args.side}, {args.precision}: {apart.mean():.4f} of 255 levels apart on average, "
          f"{apart.max():.2f} at most; the rows from {rows.min():.4f} to {rows.max():.4f}")


if __name__ == "__main__":
    main()
