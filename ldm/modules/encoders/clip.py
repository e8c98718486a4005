"""The CLIP transformers (Radford et al. 2021), under the names that `transformers` gave the weights: pre-norm blocks of
self-attention and a two-layer perceptron, causal for text."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import ConfigError
from ldm.modules.attention_ops import attention


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU, x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


# Mean and standard deviation of the colours that CLIP was trained on, red, green, blue in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class ClipConfig:
    """The shape of one tower; `ff` is the width inside the perceptron, 4 * width where it is None.

    Text reads vocabulary, length and eos (the id whose position is pooled; None for the largest id of a row), pictures
    image and patch (sides in pixels).
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    ff: int | None = None
    act: str = "quick_gelu"
    eps: float = 1e-5
    vocabulary: int = 49408
    length: int = 77
    eos: int | None = 49407
    image: int = 224
    patch: int = 14

    @property
    def inner(self) -> int:
        return self.ff or 4 * self.width

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


def tower_config(found: Mapping[str, Any], source: Path) -> ClipConfig:
    """One tower, text or vision, as a config.json in the transformers form describes it.

    Raises ConfigError, naming `source`, where the shape of the transformer is not there or its activation is unknown.
    """
    own = ClipConfig()
    try:
        config = ClipConfig(
            width=found["hidden_size"], layers=found["num_hidden_layers"], heads=found["num_attention_heads"],
            ff=found["intermediate_size"], act=found.get("hidden_act", own.act),
            eps=found.get("layer_norm_eps", own.eps), vocabulary=found.get("vocab_size", own.vocabulary),
            length=found.get("max_position_embeddings", own.length),
            # Old configs say 2, which no CLIP ever used: its end mark is the largest id.
            eos=None if found.get("eos_token_id", 2) == 2 else found["eos_token_id"],
            image=found.get("image_size", own.image), patch=found.get("patch_size", own.patch),
        )
    except KeyError as error:
        raise ConfigError(f"{source} does not describe a tower of CLIP: it has no {error}") from error
    if config.act not in ACTIVATIONS:
        raise ConfigError(f"{source}: hidden_act must be {' or '.join(ACTIVATIONS)}, got {config.act!r}")
    return config


class ClipOutput(NamedTuple):
    """What a tower makes of its input.

    last_hidden_state (b, n, c); pooler_output (b, c); hidden_states: None, or the embeddings and each layer's output.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v over `heads` equal slices of the channels: (b, n, c) -> (b, n, c)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:  # which knows what is fast backwards, too
        place = positions(q.shape[2])
        out = attention(q, k, v, q.shape[-1] ** -0.5, (place <= place.mT).to(q.device) if causal else None)
    return out.transpose(1, 2).flatten(-2)


class ClipAttention(nn.Module):
    def __init__(self, config: ClipConfig, causal: bool):
        super().__init__()
        self.heads, self.causal = config.heads, causal
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.q_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=self.causal))


class ClipMLP(nn.Module):
    def __init__(self, config: ClipConfig):
        super().__init__()
        self.act = ACTIVATIONS[config.act]
        self.fc1 = nn.Linear(config.width, config.inner)
        self.fc2 = nn.Linear(config.inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ClipLayer(nn.Module):
    def __init__(self, config: ClipConfig, causal: bool):
        super().__init__()
        self.self_attn = ClipAttention(config, causal)
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = ClipMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipEncoder(nn.Module):
    """The stack of layers, which returns the embeddings and what follows each layer: layers + 1 tensors (b, n, c)."""

    def __init__(self, config: ClipConfig, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config, causal) for _ in range(config.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


def positions(length: int) -> Tensor:
    """0 ... length - 1 as (1, length), which is real also while a model is built on the meta device."""
    with torch.device("cpu"):
        return torch.arange(length)[None]


class ClipTextEmbeddings(nn.Module):
    def __init__(self, config: ClipConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)
        self.register_buffer("position_ids", positions(config.length))

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            position_ids = self.position_ids[:, :input_ids.shape[1]]
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)


def end_marks(ids: Tensor, vocabulary: int, eos: int | None = None) -> Tensor:
    """Where the end mark of each row is: (b, n) -> (b,). It is the first `eos`, or without one the largest id of the
    vocabulary, past which are those of learned words."""
    return (ids.masked_fill(ids >= vocabulary, 0) if eos is None else (ids == eos).int()).argmax(dim=-1)


class ClipTextModel(nn.Module):
    def __init__(self, config: ClipConfig):
        super().__init__()
        self.eos, self.vocabulary = config.eos, config.vocabulary
        self.embeddings = ClipTextEmbeddings(config)
        self.encoder = ClipEncoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.eps)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, output_hidden_states: bool = False
    ) -> ClipOutput:
        states = self.encoder(self.embeddings(input_ids=input_ids, position_ids=position_ids))
        last = self.final_layer_norm(states[-1])
        end = end_marks(input_ids, self.vocabulary, self.eos)
        pooled = last[torch.arange(len(last), device=last.device), end.to(last.device)]
        return ClipOutput(last, pooled, states if output_hidden_states else None)


class ClipTextTransformer(nn.Module):
    """The text tower with the checkpoints' keys, `text_model.*`.

    input_ids (b, n) int64, n <= config.length -> ClipOutput: the last state is normed, the hidden ones are not, and the
    pooled one is that of the first end mark of each row.
    """

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.text_model = ClipTextModel(config)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, output_hidden_states: bool = False
    ) -> ClipOutput:
        return self.text_model(input_ids, position_ids, output_hidden_states)


class ClipVisionEmbeddings(nn.Module):
    def __init__(self, config: ClipConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(config.width)))
        self.patch_embedding = nn.Conv2d(3, config.width, kernel_size=config.patch, stride=config.patch, bias=False)
        self.position_embedding = nn.Embedding(config.patches + 1, config.width)
        self.register_buffer("position_ids", positions(config.patches + 1))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (b, patches, c)
        mark = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([mark, patches], dim=1) + self.position_embedding(self.position_ids)


class ClipVisionModel(nn.Module):
    def __init__(self, config: ClipConfig):
        super().__init__()
        self.embeddings = ClipVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width, eps=config.eps)  # so spelt in the checkpoints
        self.encoder = ClipEncoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, pixels: Tensor) -> ClipOutput:
        last = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[-1]
        return ClipOutput(last, self.post_layernorm(last[:, 0]))


class ClipVisionTransformer(nn.Module):
    """The picture tower with the checkpoints' keys, `vision_model.*`.

    pixels (b, 3, config.image, config.image), normalised -> ClipOutput; the pooled state is that of the class mark.
    """

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.vision_model = ClipVisionModel(config)

    def forward(self, pixels: Tensor) -> ClipOutput:
        return self.vision_model(pixels)
