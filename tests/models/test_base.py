import subprocess
import sys

import torch
from torch import nn

from ldm.models.base import LightModule


def last_line(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]


def test_models_import_no_lightning():
    code = "import sys, ldm.models.autoencoder; print('pytorch_lightning' in sys.modules)"
    assert last_line(code) == "False"


def test_models_are_lightning_modules_where_lightning_came_first():
    # A stand-in for the package: only that it has been imported, and its one class, matter.
    code = (
        "import sys, types, torch; package = types.ModuleType('pytorch_lightning');"
        "package.LightningModule = type('LightningModule', (torch.nn.Module,), {});"
        "sys.modules['pytorch_lightning'] = package;"
        "from ldm.models.autoencoder import AutoencoderKL; print(issubclass(AutoencoderKL, package.LightningModule))"
    )
    assert last_line(code) == "True"


def test_the_light_module_lies_where_its_weights_do():
    module = LightModule()
    assert module.device == torch.device("cpu")
    module.register_buffer("table", torch.zeros(2, device="meta"))
    assert module.device == torch.device("meta")
    module.layer = nn.Linear(1, 1)
    assert module.device == torch.device("cpu")


def test_the_light_module_takes_what_a_model_logs():
    module = LightModule()
    module.log("loss", 1.0, prog_bar=True)
    module.log_dict({"loss": 1.0})
    assert module.global_step == 0
