"""The contracts (tests/contracts), and the tiny models that they describe, for every test folder."""

import gzip
import json
from functools import cache
from pathlib import Path

import fill  # the weight rule, a plain file beside the goldens
import numpy as np
import torch
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config

CONTRACTS = Path(__file__).parent / "contracts"
GOLDENS = CONTRACTS / "goldens"

@cache
def manifest(name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """{key: (shape, dtype)} of a published checkpoint layout, e.g. `sd-v1`."""
    with gzip.open(CONTRACTS / "checkpoints" / f"{name}.json.gz") as file:
        return {key: (tuple(shape), dtype) for key, (shape, dtype) in json.load(file).items()}


@cache
def golden(name: str) -> dict[str, torch.Tensor]:
    """The arrays of one golden file by name, e.g. `golden("unet")["unet_v1/eps_t0"]`."""
    with np.load(GOLDENS / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@cache
def cases(kind: str) -> list[dict]:
    """The golden cases of one kind, as `spec.json` describes them."""
    return [case for case in json.loads((GOLDENS / "spec.json").read_text())["cases"] if case["kind"] == kind]


@cache
def tiny_model(name: str = "tiny", salt: int = 0) -> torch.nn.Module:
    """The model of a golden YAML with rule-made weights. Shared between tests: leave it as it is."""
    model = instantiate_from_config(OmegaConf.load(GOLDENS / f"{name}.yaml").model).eval()
    return fill.fill_module(model, salt)


def assert_matches(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Fail where max|got - want| / max|want| is over the tolerance of the contract."""
    got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double()
    assert got.shape == want.shape, f"shape {tuple(got.shape)} where {tuple(want.shape)} was expected"
    error = (got - want).abs().max() / want.abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"relative error {error:.2e} is over {tolerance:.0e}"
