"""A tiny depth network: its sizes here, and the same one in transformers."""

import torch
import transformers

from ldm.checkpoint.diffusers import place, split
from ldm.checkpoint.dpt import dpt_names

SIZES = {"side": 64, "stem": 32, "stages": [[128, 1], [128, 2], [128, 1]], "width": 64, "depth": 4, "heads": 4,
         "hooks": [2, 3], "features": 32}  # fmt: skip
BIT = {"model_type": "bit", "layer_type": "bottleneck", "depths": [1, 2, 1], "hidden_sizes": [128, 128, 128],
       "embedding_size": 32, "global_padding": "same", "out_features": ["stage1", "stage2", "stage3"],
       "embedding_dynamic_padding": True}  # fmt: skip


def their_dpt(weights: dict[str, torch.Tensor]) -> transformers.DPTForDepthEstimation:
    """transformers' network with our weights, all of which it must know but the classifier's."""
    config = transformers.DPTConfig(
        is_hybrid=True, backbone_config=BIT, image_size=64, patch_size=16, hidden_size=64, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=256, backbone_out_indices=[0, 1, 2, 3],
        backbone_featmap_shape=[1, 128, 4, 4], neck_hidden_sizes=[128, 128, 64, 64], fusion_hidden_size=32,
        reassemble_factors=[1, 1, 1, 0.5], neck_ignore_stages=[0, 1], readout_type="project",
        layer_norm_eps=1e-6)  # fmt: skip
    names, state = dpt_names(weights), {}
    for key, weight in weights.items():
        pieces = split(key, weight)
        for index, piece in enumerate(pieces):
            state[place(f"{key}/{index}" if len(pieces) > 1 else key, names)] = piece
    state.pop(None)  # the classifier
    model = transformers.DPTForDepthEstimation(config).eval().requires_grad_(False)
    model.load_state_dict(state)
    return model
