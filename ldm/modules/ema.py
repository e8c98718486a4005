"""An exponential moving average of a model's weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LitEma(nn.Module):
    """Shadows of the trainable parameters, kept as buffers whose names are the parameters' without their dots.

    Each call moves them by `shadow += (1 - d) * (weight - shadow)`, where d rises to `decay` as (1 + n) / (10 + n) over
    the calls n, or is `decay` from the start without `use_num_upates`.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True):
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie between 0 and 1, got {decay}")
        self.m_name2s_name = {name: name.replace(".", "") for name, p in model.named_parameters() if p.requires_grad}
        self.collected_params: list[Tensor] = []
        with torch.device("cpu"):
            self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
            self.register_buffer("num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_buffer(self.m_name2s_name[name], parameter.detach().clone())

    def reset_num_updates(self) -> None:
        """Let the decay rise from its beginning again."""
        self.num_updates.zero_()

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move every shadow towards the model's weights."""
        decay = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = torch.minimum(decay, (1 + self.num_updates) / (10 + self.num_updates))
        for shadow, parameter in self._pairs(model):
            shadow.lerp_(parameter.to(shadow.dtype), (1 - decay).to(shadow))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights with the shadows."""
        for shadow, parameter in self._pairs(model):
            parameter.copy_(shadow)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep a copy of the weights for `restore`."""
        self.collected_params = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the stored weights back."""
        for stored, parameter in zip(self.collected_params, parameters):
            parameter.copy_(stored)
        self.collected_params = []

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, nn.Parameter]]:
        parameters = dict(model.named_parameters())
        shadows = dict(self.named_buffers())
        return [(shadows[shadow], parameters[name]) for name, shadow in self.m_name2s_name.items()]
