"""Several encoders that tell a network one thing together: texts, sizes, scores (Podell et al. 2023, section 2.2)."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.modules.encoders.general import AbstractEncoder
from ldm.modules.encoders.text import TextEncoder
from ldm.prompt import Weighted
from ldm.util import instantiate_from_config

# What DiffusionWrapper takes, by the number of axes that an encoder's answer has, and along which axis answers join.
ENTRIES = {2: ("c_adm", 1), 3: ("c_crossattn", 2), 4: ("c_concat", 1)}

Told = dict[str, Tensor | list[Tensor]]  # {"c_crossattn": [(b, n, c)], "c_adm": (b, d)}


class ConcatTimestepEmbedderND(AbstractEncoder):
    """Each of n numbers as `outdim` cosines and sines, one after the other: (b, n) -> (b, n * outdim)."""

    def __init__(self, outdim: int):
        super().__init__()
        self.outdim = outdim

    def forward(self, x: Tensor) -> Tensor:
        return timestep_embedding(x.flatten(), self.outdim).unflatten(0, x.shape).flatten(1)


class GeneralConditioner(AbstractEncoder):
    """The encoders of `emb_models`, whose answers of the same number of axes are joined channel by channel.

    emb_models: configs, each with the `input_key` of the batch that its encoder reads; all text encoders read the
    prompt. zero_empty: whether an empty negative prompt stands for zeros, as in training texts were left out of the
    base, or is encoded like any other, as for the refiner; None tells them apart by the number of text encoders.
    """

    def __init__(self, emb_models: Sequence[Mapping], zero_empty: bool | None = None):
        super().__init__()
        self.embedders = nn.ModuleList(map(embedder, emb_models))
        self.zero_empty = len(self.texts) > 1 if zero_empty is None else zero_empty

    @property
    def texts(self) -> list[TextEncoder]:
        return [one for one in self.embedders if isinstance(one, TextEncoder)]

    @property
    def measures(self) -> list[str]:
        """The input keys of what is no text, in the order in which the network is told them."""
        return [one.input_key for one in self.embedders if not isinstance(one, TextEncoder)]

    @property
    def device(self) -> torch.device:
        """Where inputs go; set, it holds for every encoder."""
        return super().device

    @device.setter
    def device(self, device: str | torch.device) -> None:
        AbstractEncoder.device.fset(self, device)
        for one in self.embedders:
            one.device = device

    def forward(self, batch: Mapping) -> Told:
        """What a batch, with an entry for each input key, tells the network."""
        return joined(one(batch[one.input_key]) for one in self.embedders)

    def encode(self, texts: str | Sequence[str]) -> Told:
        """What b texts tell by themselves."""
        first, *others = self.texts  # of which one is enough to warn of what is cut
        return joined([first(texts), *(one.encode_ids(one.ids(texts)) for one in others)])

    def chunks(self, text: str) -> list[list[int]]:
        """The ids of a prompt in runs that fit, by the encoder that needs most of them."""
        return max((one.chunks(text) for one in self.texts), key=len)

    def encode_long(self, texts: Sequence[str], count: int | None = None) -> Told:
        """As `TextEncoder.encode_long`, with the same number of chunks for each encoder."""
        count = count or max(len(self.chunks(text)) for text in texts)
        return joined(one.encode_long(texts, count) for one in self.texts)

    def dropped(self, text: str) -> str:
        """The end of a prompt that does not fit."""
        return max((one.dropped(text) for one in self.texts), key=len)

    def weigh(self, states: Told, prompt: Sequence[Weighted], count: int | None = None) -> Told:
        """As `TextEncoder.weigh`, each encoder by itself; the vector of the text stays as it is."""
        (context,) = states["c_crossattn"]
        parts = context.split([one.width for one in self.texts], dim=-1)
        weighed = [one.weigh(part, prompt, count) for one, part in zip(self.texts, parts, strict=True)]
        return {**states, "c_crossattn": [torch.cat(weighed, dim=-1)]}

    def nothing(self, states: Told) -> Told:
        """Zeros in the form of some states: what this model was trained to take for no text."""
        return {"c_crossattn": [torch.zeros_like(one) for one in states["c_crossattn"]],
                **{key: torch.zeros_like(one) for key, one in states.items() if key != "c_crossattn"}}  # fmt: skip

    def measure(self, values: Mapping[str, Sequence[float]]) -> Tensor:
        """Sizes and scores by their input keys as one vector (1, d)."""
        return joined(
            one(torch.tensor([values[one.input_key]], dtype=torch.float32, device=self.device))
            for one in self.embedders if not isinstance(one, TextEncoder)
        )["c_adm"]  # fmt: skip


def embedder(config: Mapping) -> AbstractEncoder:
    """One encoder of `emb_models`, which knows its input key."""
    if "input_key" not in config:
        raise ConfigError(f"each entry of emb_models needs an input_key, {config.get('target')} has none")
    built = instantiate_from_config(config)
    built.input_key = config["input_key"]
    return built


def joined(answers: Iterable[Tensor | tuple[Tensor, ...]]) -> Told:
    """The answers of several encoders, (b, d) and (b, n, c), each a tensor or several."""
    found: dict[str, Tensor] = {}
    for answer in answers:
        for tensor in (answer,) if isinstance(answer, Tensor) else answer:
            key, axis = ENTRIES[tensor.ndim]
            found[key] = torch.cat([found[key], tensor], dim=axis) if key in found else tensor
    return {key: tensor if key == "c_adm" else [tensor] for key, tensor in found.items()}
