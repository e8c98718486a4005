"""The text encoder of the x2 latent upscaler."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.modules.encoders.text import FrozenCLIPEmbedder
from ldm.prompt import Weighted


class FrozenCLIPStatesAndWhole(FrozenCLIPEmbedder):
    """The states before the last norm, then the pooled one, which stands for the whole text: (b, 77 + 1, c).

    Of a long prompt, each chunk has both.
    """

    def encode_ids(self, ids: Tensor) -> Tensor:
        out = self.transformer(input_ids=ids, output_hidden_states=True)
        return torch.cat([out.hidden_states[-1], out.pooler_output[:, None]], dim=1)

    def weigh(self, states: Tensor, prompt: Sequence[Weighted], count: int | None = None) -> Tensor:
        chunks = states.unflatten(1, (-1, self.max_length + 1))
        words = super().weigh(chunks[:, :, :-1].flatten(1, 2), prompt, count).unflatten(1, (-1, self.max_length))
        return torch.cat([words, chunks[:, :, -1:]], dim=2).flatten(1, 2)
