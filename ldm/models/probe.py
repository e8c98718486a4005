"""What the names and shapes of weights do not tell, measured on the network itself."""

from pathlib import Path

import torch

from ldm.checkpoint import open_checkpoint
from ldm.checkpoint.families import CONTEXT
from ldm.models.load import assign, build_model, match

SIDE = 8  # of the latents: as small as the network takes, and still enough numbers for a correlation
NETWORK = "model."


@torch.inference_mode()
def noise_returned(config: str | Path, checkpoint: str | Path) -> float:
    """How much of noise alone a network gives back at its last timestep: a correlation, near 1 if it predicts eps.

    There alpha is nearly 0, so v = alpha * eps - sigma * x0 is hardly more than a guess at the picture with its sign
    turned, and that is near 0. One call on the CPU, with weights that stay in the file.
    Raises ConfigError, CheckpointError where the weights do not fit the config.
    """
    model, file = build_model(config), open_checkpoint(checkpoint)
    weights = match(model, file.tensors, file, str(config))
    own = {name.removeprefix(NETWORK): weight for name, weight in weights.items() if name.startswith(NETWORK)}
    assign(model.model, own, file, torch.device("cpu"), next(iter(own.values())).dtype, mapped=True)
    noise = torch.randn(1, model.channels, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    context = torch.zeros(1, 77, weights[CONTEXT].shape[1])
    out = model.eval().apply_model(noise, torch.tensor([model.num_timesteps - 1]), context)
    return float(torch.corrcoef(torch.stack([noise.flatten(), out.float().flatten()]))[0, 1])
