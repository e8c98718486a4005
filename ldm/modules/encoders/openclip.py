"""CLIP (Radford et al. 2021) under the names that OpenAI's package and open_clip give the weights."""

import logging
import math
from collections.abc import Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.modules.encoders.clip import ACTIVATIONS, ClipConfig, attend, end_marks, positions
from ldm.modules.encoders.files import WEIGHTS, local_folder, pick, read_weights

logger = logging.getLogger(__name__)


class Attention(nn.Module):
    """Self-attention whose three projections are one matrix: (b, n, c) -> (b, n, c)."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.heads = config.heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.width, config.width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.width))
        self.out_proj = nn.Linear(config.width, config.width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        mask = None if attn_mask is None else attn_mask.to(q.dtype)
        return self.out_proj(attend(q, k, v, self.heads, mask=mask))


class MLP(nn.Module):
    def __init__(self, config: ClipConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.width, config.inner)
        self.gelu = ACTIVATIONS[config.act]
        self.c_proj = nn.Linear(config.inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    def __init__(self, config: ClipConfig):
        super().__init__()
        self.attn = Attention(config)
        self.ln_1 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), attn_mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The stack of blocks, from number `start`; `skip` leaves out that many of the last: (b, n, c) -> (b, n, c)."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(config) for _ in range(config.layers))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, skip: int = 0, start: int = 0) -> Tensor:
        for block in islice(self.resblocks, start, len(self.resblocks) - skip):
            x = block(x, attn_mask=attn_mask)
        return x


class VisualTransformer(nn.Module):
    """The picture tower: normalised pixels (b, 3, config.image, config.image) -> (b, embed)."""

    def __init__(self, config: ClipConfig, embed: int):
        super().__init__()
        self.image = config.image
        self.conv1 = nn.Conv2d(3, config.width, kernel_size=config.patch, stride=config.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.positional_embedding = nn.Parameter(torch.empty(config.patches + 1, config.width))
        self.ln_pre = nn.LayerNorm(config.width, eps=config.eps)
        self.transformer = Transformer(config)
        self.ln_post = nn.LayerNorm(config.width, eps=config.eps)
        self.proj = nn.Parameter(torch.empty(config.width, embed))
        for weight in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(weight, std=config.width**-0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)  # (b, patches, c)
        mark = self.class_embedding.expand(len(patches), 1, -1)
        x = torch.cat([mark, patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class Clip(nn.Module):
    """The text tower, and the picture tower where `vision` is given, into one space of `embed` dimensions."""

    def __init__(self, text: ClipConfig, vision: ClipConfig | None = None, embed: int | None = None):
        super().__init__()
        embed = embed or text.width
        self.vocabulary = text.vocabulary
        if vision is not None:
            self.visual = VisualTransformer(vision, embed)
        self.transformer = Transformer(text)
        self.token_embedding = nn.Embedding(text.vocabulary, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.length, text.width))
        self.ln_final = nn.LayerNorm(text.width, eps=text.eps)
        self.text_projection = nn.Parameter(torch.empty(text.width, embed))
        self.logit_scale = nn.Parameter(torch.full((), math.log(1 / 0.07)))
        later = positions(text.length) > positions(text.length).mT
        self.register_buffer("attn_mask", later.float().masked_fill(later, -torch.inf), persistent=False)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=text.width**-0.5)

    def text_states(self, ids: Tensor, skip: int = 0) -> Tensor:
        """States (b, n, c) after the final norm, which follows the last block but `skip`. ids: (b, n) int64."""
        return self.ln_final(self.transformer(self.embed(ids), attn_mask=self.mask(ids), skip=skip))

    def encode_text(self, ids: Tensor) -> Tensor:
        """One vector a text, taken at its end mark, the largest id: (b, n) -> (b, embed)."""
        return self.pool(self.text_states(ids), ids)

    def text_features(self, ids: Tensor, skip: int = 0) -> tuple[Tensor, Tensor]:
        """States (b, n, c) after the last block but `skip`, not normed, and the vector (b, embed) of each text."""
        mask = self.mask(ids)
        states = self.transformer(self.embed(ids), attn_mask=mask, skip=skip)
        last = self.transformer(states, attn_mask=mask, start=len(self.transformer.resblocks) - skip)
        return states, self.pool(self.ln_final(last), ids)

    def embed(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]

    def mask(self, ids: Tensor) -> Tensor:
        return self.attn_mask[:ids.shape[1], :ids.shape[1]]

    def pool(self, states: Tensor, ids: Tensor) -> Tensor:
        end = end_marks(ids, self.vocabulary)
        return states[torch.arange(len(states), device=states.device), end] @ self.text_projection

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.visual(pixels)


# The names of transformers, part for part, and ours.
TRANSFORMERS_NAMES = (
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
    (".self_attn.", ".attn."),
    (".layer_norm", ".ln_"),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a whole CLIP in the transformers form under the names of `Clip`."""
    named = {}
    for key, weight in state.items():
        for theirs, ours in TRANSFORMERS_NAMES:
            key = key.replace(theirs, ours)
        named[key] = weight.T if key in ("visual.proj", "text_projection") else weight
    for key in [key for key in named if ".attn.q_proj." in key]:
        parts = [named.pop(key.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        named[key.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return named


# The models of OpenAI's package: text tower, picture tower, dimensions of the common space, and the name under which
# the same weights are published in the transformers form.
CLIP_PACKAGE = {
    "ViT-B/32": (
        ClipConfig(width=512, heads=8), ClipConfig(patch=32), 512, "openai/clip-vit-base-patch32",
    ),
    "ViT-B/16": (
        ClipConfig(width=512, heads=8), ClipConfig(patch=16), 512, "openai/clip-vit-base-patch16",
    ),
    "ViT-L/14": (
        ClipConfig(), ClipConfig(width=1024, layers=24, heads=16), 768, "openai/clip-vit-large-patch14",
    ),
    "ViT-L/14@336px": (
        ClipConfig(), ClipConfig(width=1024, layers=24, heads=16, image=336), 768, "openai/clip-vit-large-patch14-336",
    ),
}


def published_clip(name: str, vision: bool = False) -> Clip:
    """A model of OpenAI's package, with its picture tower or without.

    Off the meta device it reads its weights from models/ or the Hugging Face cache; where they are not at hand it warns
    that a checkpoint must bring them. Raises ConfigError for an unknown name.
    """
    if name not in CLIP_PACKAGE:
        raise ConfigError(f"no CLIP model {name!r}: it must be one of {', '.join(CLIP_PACKAGE)}")
    text_config, vision_config, embed, published = CLIP_PACKAGE[name]
    clip = Clip(text_config, vision_config if vision else None, embed)
    if clip.logit_scale.is_meta:
        return clip
    if folder := local_folder(published, WEIGHTS):
        clip.load_state_dict(pick(from_transformers(read_weights(folder)), clip.state_dict(), folder))
    else:
        logger.warning("CLIP %s has random weights until a checkpoint brings some: no copy of %s here", name, published)
    return clip
