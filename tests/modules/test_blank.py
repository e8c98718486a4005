import subprocess
import sys

import torch

from ldm.modules.blank import blank


def test_parameters_built_blank_take_no_memory_and_other_tensors_are_filled_as_ever():
    with blank():
        table = torch.nn.Embedding(5, 3)
        with torch.device("cpu"):
            real = torch.nn.init.normal_(torch.zeros(100)).normal_()
            layer = torch.nn.Linear(3, 3)
    assert table.weight.is_meta
    assert not layer.weight.is_meta
    assert layer.weight.abs().sum() > 0
    assert 0.5 < real.std() < 1.5


def test_a_text_encoder_is_built_blank_without_the_compiler_and_without_transformers():
    code = (
        "import sys; from ldm.modules.blank import blank; from ldm.modules.encoders.modules import FrozenCLIPEmbedder\n"
        "with blank(): encoder = FrozenCLIPEmbedder()\n"
        "assert all(p.is_meta for p in encoder.parameters())\n"
        "sys.exit(', '.join({'torch._dynamo', 'transformers', 'huggingface_hub'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
