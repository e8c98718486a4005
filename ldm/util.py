"""Building objects from `target:` + `params:`, and the classical helpers that public code imports from here."""

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from ldm.errors import ConfigError, MissingExtra

logger = logging.getLogger(__name__)

# Where the targets of older YAML files live now; the longest matching prefix wins.
TARGET_PREFIXES = {
    "ldm.models.diffusion.ddpm_edit.LatentDiffusion": "ldm.models.diffusion.ddpm.LatentEditDiffusion",
    "main.": "ldm.training.",
    "stable_diffusion.ldm.": "ldm.",
    "taming.data.": "ldm.data.",
    "taming.modules.": "ldm.modules.",
    "sgm.": "ldm.",
    "sgm.models.autoencoder.AutoencoderKLInferenceWrapper": "ldm.models.autoencoder.AutoencoderKL",
    "sgm.models.diffusion.": "ldm.models.diffusion.engine.",
    "sgm.modules.GeneralConditioner": "ldm.modules.encoders.modules.GeneralConditioner",
    "sgm.modules.diffusionmodules.denoiser_scaling.": "ldm.modules.diffusionmodules.denoiser.",
    "sgm.modules.diffusionmodules.denoiser_weighting.": "ldm.modules.diffusionmodules.denoiser.",
    "sgm.modules.diffusionmodules.discretizer.": "ldm.modules.diffusionmodules.denoiser.",
}

# A stage that YAML names by a word instead of a config: there is nothing to build.
NO_STAGE = ("__is_first_stage__", "__is_unconditional__")


def exists(x) -> bool:
    return x is not None


def default(val, d):
    """`val` unless it is None, else `d`, called if it is a plain function."""
    if val is not None:
        return val
    return d() if inspect.isfunction(d) else d


def optional(module: str, extra: str):
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{module} is not installed; run: pip install -e '.[{extra}]'") from error


def current_target(target: str) -> str:
    """The dotted name that `target` of an older YAML file has here; one row of the table may lead to another."""
    matches = [prefix for prefix in TARGET_PREFIXES if target.startswith(prefix)]
    if not matches:
        return target
    prefix = max(matches, key=len)
    return current_target(TARGET_PREFIXES[prefix] + target[len(prefix):])


def get_obj_from_str(string: str, reload: bool = False):
    """The object at a dotted path, e.g. `ldm.models.autoencoder.AutoencoderKL`.

    Raises ConfigError where the path does not lead to anything; an error inside the imported module passes through.
    """
    module_name, _, name = current_target(string).rpartition(".")
    if not module_name:
        raise ConfigError(f"target must be a dotted path such as torch.nn.Identity, got {string!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise ConfigError(f"unknown target {string!r}: there is no module {error.name}") from error
        raise
    if reload:
        module = importlib.reload(module)
    if not hasattr(module, name):
        raise ConfigError(f"unknown target {string!r}: {module_name} has no {name}")
    return getattr(module, name)


def instantiate_from_config(config: Mapping[str, Any] | str) -> Any:
    """Call `config["target"]` with `config["params"]`; None for the two words that stand for no stage at all.

    Raises KeyError without `target`, ConfigError where the target does not exist.
    """
    if isinstance(config, str) and config in NO_STAGE:
        return None
    if "target" not in config:
        raise KeyError("Expected key `target` to instantiate.")
    return get_obj_from_str(config["target"])(**(config.get("params") or {}))


def ismap(x) -> bool:
    """True for a tensor (b, c, h, w) with more channels than a picture has."""
    return getattr(x, "ndim", None) == 4 and hasattr(x, "dtype") and x.shape[1] > 3


def isimage(x) -> bool:
    """True for a tensor (b, c, h, w) with one or three channels."""
    return getattr(x, "ndim", None) == 4 and hasattr(x, "dtype") and x.shape[1] in (1, 3)


def mean_flat(tensor):
    """Mean over every axis but the first: (b, ...) -> (b,)."""
    return tensor.mean(dim=list(range(1, tensor.ndim)))


def count_params(model, verbose: bool = False) -> int:
    """Number of parameters of a module."""
    total = sum(p.numel() for p in model.parameters())
    if verbose:
        logger.info("%s has %.2f M parameters", type(model).__name__, total * 1e-6)
    return total


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10):
    """Draw each text on white: list of n strings -> tensor (n, 3, h, w) in [-1, 1]; wh is (width, height) in pixels."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont

    width, height = wh
    font = ImageFont.load_default(size)
    letters = max(1, int(40 * width / 256))

    def draw(text: str) -> np.ndarray:
        image = Image.new("RGB", (width, height), color="white")
        lines = "\n".join(text[start:start + letters] for start in range(0, len(text), letters))
        ImageDraw.Draw(image).text((0, 0), lines, fill="black", font=font)
        return np.array(image).transpose(2, 0, 1) / 127.5 - 1.0

    return torch.tensor(np.stack([draw(text) for text in xc]), dtype=torch.float32)


def parallel_data_prefetch(
    func: Callable,
    data,
    n_proc: int,
    target_data_type: str = "ndarray",
    cpu_intensive: bool = True,
    use_worker_id: bool = False,
):
    """Map `func` over n_proc chunks of `data` in parallel and put the results together in order.

    data: an array, split along its first axis, or any iterable; `func(chunk)` or `func(chunk, worker)` gives an array
    or a list. The workers are processes if `cpu_intensive`, else threads.
    """
    import numpy as np

    if target_data_type not in ("ndarray", "list"):
        raise ValueError(f"target_data_type must be ndarray or list, got {target_data_type!r}")
    if isinstance(data, np.ndarray):
        chunks = [chunk for chunk in np.array_split(data, n_proc) if len(chunk)]
    else:
        data = list(data.values() if isinstance(data, dict) else data)
        step = -(-len(data) // n_proc) or 1
        chunks = [data[start:start + step] for start in range(0, len(data), step)]
    if not chunks:
        raise ValueError("parallel_data_prefetch got no data")
    executor = ProcessPoolExecutor if cpu_intensive else ThreadPoolExecutor
    arguments = [chunks, range(len(chunks))] if use_worker_id else [chunks]
    with executor(n_proc) as pool:
        parts = list(pool.map(func, *arguments))
    if target_data_type == "ndarray":
        return np.concatenate(parts, axis=0)
    return [item for part in parts for item in part]
