"""CLIP's text encoders: prompts in, states (b, n, c) for cross-attention out."""

import html
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import ConfigError, RequestError
from ldm.modules.encoders.clip import ClipConfig, ClipTextTransformer, tower_config
from ldm.modules.encoders.files import find_folder, pick, read_json, read_weights
from ldm.modules.encoders.general import AbstractEncoder
from ldm.modules.encoders.openclip import Clip, published_clip
from ldm.modules.encoders.tokenizer import CLIP_VOCABULARY, TextTokenizer, clip_tokenizer, tokenizer_folder
from ldm.prompt import Weighted, plain_text, split

logger = logging.getLogger(__name__)

# The text towers that are known by name; the weights come with the checkpoint of the model that uses them.
CLIP_VERSIONS = {
    "openai/clip-vit-large-patch14": ClipConfig(),
    "openai/clip-vit-large-patch14-336": ClipConfig(),
    "openai/clip-vit-base-patch32": ClipConfig(width=512, heads=8),
    "openai/clip-vit-base-patch16": ClipConfig(width=512, heads=8),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ClipConfig(width=1024, layers=24, heads=16, act="gelu"),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": ClipConfig(width=1280, layers=32, heads=20, act="gelu"),
}

OPEN_CLIP_ARCHS = {
    "ViT-B-32": (ClipConfig(width=512, heads=8, act="gelu"), 512),
    "ViT-B-16": (ClipConfig(width=512, heads=8, act="gelu"), 512),
    "ViT-L-14": (ClipConfig(act="gelu"), 768),
    "ViT-H-14": (ClipConfig(width=1024, layers=24, heads=16, act="gelu"), 1024),
    "ViT-g-14": (ClipConfig(width=1024, layers=24, heads=16, act="gelu"), 1024),
    "ViT-bigG-14": (ClipConfig(width=1280, layers=32, heads=20, act="gelu"), 1280),
}

# Typographic quotes, which the tokenizers of OpenAI and open_clip read as plain ones.
PLAIN_QUOTES = str.maketrans({**dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc", "'"),
                              **dict.fromkeys("\u201c\u201d\u201e\u201f", '"')})


class TextEncoder(AbstractEncoder):
    """A `tokenizer`, a `max_length` in tokens with both marks, and `encode_ids`: (b, n) int64 -> (b, n, c)."""

    tokenizer: TextTokenizer
    max_length: int

    @property
    def width(self) -> int:
        """The channels of a state."""
        raise NotImplementedError(f"{type(self).__name__} does not tell its width")

    def encode_ids(self, ids: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no encode_ids")

    def clean(self, text: str) -> str:
        """The text that the tokenizer is given."""
        return text

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a cleaned text without marks, and where in it each stands."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"]

    def dropped(self, text: str) -> str:
        """The end of a prompt that does not fit in `max_length` tokens, as it was written; "" where all of it fits."""
        text, room = self.clean(text), self.max_length - 2
        _, spans = self.spans(text)
        return text[spans[room][0]:].strip() if len(spans) > room else ""

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Ids (b, max_length) of each text, padded or cut; what is cut is quoted in a warning."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in dict.fromkeys(texts):
            if lost := self.dropped(text):
                logger.warning("the prompt is longer than %d tokens; this was dropped: %r", self.max_length - 2, lost)
        return self.ids(texts)

    def ids(self, texts: str | Sequence[str]) -> Tensor:
        """As `tokenize`, in silence."""
        batch = self.tokenizer(
            [self.clean(text) for text in ([texts] if isinstance(texts, str) else texts)],
            truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt",
        )
        return batch["input_ids"].to(self.device)

    def forward(self, text: str | Sequence[str]) -> Tensor:
        return self.encode_ids(self.tokenize(text))

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """One text or b texts -> (b, n, c) in the weights' dtype."""
        return self(text)

    def chunks(self, text: str) -> list[list[int]]:
        """The ids of a prompt in runs that each fit between two marks, cut as `ldm.prompt.split` does."""
        text = self.clean(text)
        ids, spans = self.spans(text)
        return [ids[run] for run in split(text, spans, self.max_length - 2)]

    def encode_long(self, texts: Sequence[str], count: int | None = None) -> Tensor:
        """Encode each prompt in `count` chunks, one after the other: (b, count * max_length, c).

        count defaults to what the longest text needs; a prompt and its negative need the larger of the two. A text with
        fewer chunks is filled up with empty ones. Raises ValueError where `count` is too small.
        """
        states = self.encode_ids(self.chunk_ids(texts, count))  # (b * count, max_length, c)
        return states.unflatten(0, (len(texts), -1)).flatten(1, 2)

    def chunk_ids(self, texts: Sequence[str], count: int | None = None) -> Tensor:
        """The ids of each prompt in `count` chunks, marked and padded: (b * count, max_length); see `encode_long`."""
        rows = [self.chunks(text) for text in texts]
        need = max(map(len, rows))
        count = need if count is None else count
        if count < need:
            raise ValueError(f"the longest prompt needs {need} chunks, got count={count}")
        bos, eos, pad = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        filled = [run for row in rows for run in row + [[]] * (count - len(row))]
        ids = [[bos, *run, eos] + [pad] * (self.max_length - 2 - len(run)) for run in filled]
        return torch.tensor(ids, device=self.device)

    def token_weights(self, prompt: Sequence[Weighted], count: int | None = None) -> Tensor:
        """The weight of each token of a prompt, marks and padding 1: (chunks, max_length)."""
        weights = [weight for text, weight in prompt for _ in self.spans(self.clean(text))[0]]
        text, room = self.clean(plain_text(prompt)), self.max_length - 2
        runs = [slice(0, room)] if count is None else split(text, self.spans(text)[1], room)
        rows = torch.ones(count or 1, self.max_length)
        for row, run in zip(rows, runs):
            kept = torch.tensor(weights[run])
            row[1:1 + len(kept)] = kept
        return rows

    def weigh(self, states: Tensor, prompt: Sequence[Weighted], count: int | None = None) -> Tensor:
        """Multiply each state by the weight of its token, then all of a chunk so that their mean is what it was.

        states: (1, n, c), what `encode` gives for the words of the prompt, or `encode_long` in `count` chunks. This is
        the convention of AUTOMATIC1111's web UI, for each prompt by itself. Raises RequestError where a text is one
        vector.
        """
        weights = self.token_weights(prompt, count).to(states.device)
        if states.shape[1] != weights.numel():
            raise RequestError(f"{type(self).__name__} does not give a state for each token: it cannot weigh words")
        before = states.float().unflatten(1, weights.shape)  # (1, chunks, max_length, c)
        after = before * weights[..., None]
        wanted, got = (x.mean(dim=(2, 3), keepdim=True) for x in (before, after))
        # States without a bias have no mean but for rounding, and nothing to be restored.
        real = got.abs() > 1e-5 * after.abs().mean(dim=(2, 3), keepdim=True)
        return (after * torch.where(real, wanted / got, 1.0)).flatten(1, 2).to(states.dtype)


class FrozenCLIPEmbedder(TextEncoder):
    """The text tower of CLIP as Stable Diffusion v1 uses it: texts -> (b, 77, 768).

    version: a name of CLIP_VERSIONS, whose weights a checkpoint must bring, or a folder in the transformers form
    (config.json, weights, tokenizer), read here unless the model is being built on meta. layer: "last" (after the final
    norm), "pooled" (b, 1, c), or "hidden" with layer_idx (without the norm). `device` is there for old callers: inputs
    go where the weights are. Raises ConfigError for another version: nothing is ever fetched.
    """

    LAYERS = ("last", "pooled", "hidden")

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: str = "cuda",
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        layer_idx: int | None = None,
    ):
        super().__init__()
        if layer not in self.LAYERS or (layer == "hidden") != (layer_idx is not None):
            raise ConfigError(f"layer must be last, pooled, or hidden with a layer_idx; got {layer!r}, {layer_idx!r}")
        self.tokenizer, self.transformer = clip_from_version(version)
        if layer_idx is not None and abs(layer_idx) > self.transformer.config.layers:
            raise ConfigError(f"layer_idx must be at most {self.transformer.config.layers} in size, got {layer_idx}")
        self.max_length = max_length
        self.layer = layer
        self.layer_idx = layer_idx
        if freeze:
            self.freeze()

    @property
    def width(self) -> int:
        return self.transformer.config.width

    def freeze(self) -> None:
        self.transformer.eval().requires_grad_(False)

    def encode_ids(self, ids: Tensor) -> Tensor:
        out = self.transformer(input_ids=ids, output_hidden_states=self.layer == "hidden")
        if self.layer == "hidden":
            return out.hidden_states[self.layer_idx]
        return out.pooler_output[:, None] if self.layer == "pooled" else out.last_hidden_state


def clip_from_version(version: str) -> tuple[TextTokenizer, ClipTextTransformer]:
    """Tokenizer and text tower of a known name or of a folder; see FrozenCLIPEmbedder."""
    if version in CLIP_VERSIONS:
        return clip_tokenizer(), ClipTextTransformer(CLIP_VERSIONS[version])
    folder = find_folder(version)
    if folder is None:
        known = ", ".join(CLIP_VERSIONS)
        raise ConfigError(f"no CLIP text encoder {version!r}: it must be a folder with config.json, or one of {known}")
    described = read_json(folder / "config.json")
    config = tower_config(described.get("text_config") or described, folder / "config.json")
    words = tokenizer_folder(folder)
    if words is None and config.vocabulary != CLIP_VOCABULARY:
        raise ConfigError(f"{folder} has no tokenizer (vocab.json, merges.txt), and its vocabulary is not CLIP's own")
    transformer = ClipTextTransformer(config)
    if not transformer.text_model.final_layer_norm.weight.is_meta:
        found = {
            key if key.startswith("text_model.") else f"text_model.{key}": weight
            for key, weight in read_weights(folder).items()
        }
        transformer.load_state_dict(pick(found, transformer.state_dict(), folder))
    return clip_tokenizer(words), transformer


class ZeroPaddedEncoder(TextEncoder):
    """Text as the tokenizers of OpenAI's package and open_clip take it: without HTML entities, padded with id 0."""

    def __init__(self, max_length: int, words: Path | None = None):
        super().__init__()
        self.tokenizer = clip_tokenizer(words, pad_token="!", max_length=max_length)
        self.max_length = max_length

    def clean(self, text: str) -> str:
        return html.unescape(html.unescape(text)).translate(PLAIN_QUOTES).strip()

    @property
    def width(self) -> int:
        return self.model.token_embedding.embedding_dim

    def freeze(self) -> None:
        self.model.eval().requires_grad_(False)


class FrozenOpenCLIPEmbedder(ZeroPaddedEncoder):
    """The text tower of an OpenCLIP model as Stable Diffusion v2 uses it: texts -> (b, 77, 1024).

    arch: a key of OPEN_CLIP_ARCHS, or a folder in the transformers form whose config.json describes the tower, and with
    it CLIP's vocabulary or its own. layer: "last", or "penultimate" for the states before the last block; both normed.
    `version` names the weights, which a checkpoint must bring; `device` is there for old callers.
    """

    LAYERS = ("last", "penultimate")

    def __init__(
        self,
        arch: str = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: str = "cuda",
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
    ):
        config, embed, words = open_clip_arch(arch)
        super().__init__(max_length, words)
        if layer not in self.LAYERS:
            raise ConfigError(f"layer must be last or penultimate, got {layer!r}")
        self.model = Clip(config, embed=embed)
        self.layer = layer
        self.layer_idx = self.LAYERS.index(layer)
        if freeze:
            self.freeze()

    def encode_with_transformer(self, text: Tensor) -> Tensor:
        """Ids (b, n) -> states (b, n, c)."""
        return self.model.text_states(text, skip=self.layer_idx)

    def encode_ids(self, ids: Tensor) -> Tensor:
        return self.encode_with_transformer(ids)


class FrozenOpenCLIPEmbedder2(FrozenOpenCLIPEmbedder):
    """The same as Stable Diffusion XL uses it: states that no norm follows, and a vector of each text.

    legacy: the states of FrozenOpenCLIPEmbedder instead. always_return_pooled: texts -> ((b, 77, c), (b, embed)).
    """

    def __init__(self, *args, always_return_pooled: bool = False, legacy: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        if always_return_pooled and legacy:
            raise ConfigError("always_return_pooled needs legacy: False")
        self.return_pooled = always_return_pooled
        self.legacy = legacy

    def encode_ids(self, ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.legacy:
            return super().encode_ids(ids)
        states, pooled = self.model.text_features(ids, skip=self.layer_idx)
        return (states, pooled) if self.return_pooled else states

    def encode_long(self, texts: Sequence[str], count: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """As that of every encoder; the vector of a text is that of its first chunk, as in AUTOMATIC1111's web UI."""
        if not self.return_pooled:
            return super().encode_long(texts, count)
        states, pooled = self.encode_ids(self.chunk_ids(texts, count))
        return states.unflatten(0, (len(texts), -1)).flatten(1, 2), pooled.unflatten(0, (len(texts), -1))[:, 0]


def open_clip_arch(arch: str) -> tuple[ClipConfig, int, Path | None]:
    """The text tower of an `arch` of FrozenOpenCLIPEmbedder, the dimensions of the space that it leads to, and the
    folder of its vocabulary if that is not CLIP's."""
    if arch in OPEN_CLIP_ARCHS:
        return *OPEN_CLIP_ARCHS[arch], None
    folder = find_folder(arch)
    if folder is None:
        known = ", ".join(OPEN_CLIP_ARCHS)
        raise ConfigError(f"no OpenCLIP text encoder {arch!r}: it must be a folder with config.json, or one of {known}")
    described = read_json(folder / "config.json")
    config = tower_config(described, folder / "config.json")
    words = folder if (folder / "vocab.json").is_file() else None
    return config, described.get("projection_dim", config.width), words


class FrozenCLIPTextEmbedder(ZeroPaddedEncoder):
    """One vector a text in the space that CLIP shares with pictures: forward -> (b, d), encode -> (b, n_repeat, d).

    version: a key of CLIP_PACKAGE. Where a copy of its weights is on this machine it is read (see `published_clip`).
    normalize: give vectors of length 1.
    """

    def __init__(
        self,
        version: str = "ViT-L/14",
        device: str = "cuda",
        max_length: int = 77,
        n_repeat: int = 1,
        normalize: bool = True,
    ):
        super().__init__(max_length)
        self.model = published_clip(version)
        self.n_repeat = n_repeat
        self.normalize = normalize
        self.freeze()

    def encode_ids(self, ids: Tensor) -> Tensor:
        vectors = self.model.encode_text(ids)[:, None]
        return vectors / vectors.norm(dim=-1, keepdim=True) if self.normalize else vectors

    def forward(self, text: str | Sequence[str]) -> Tensor:
        return super().forward(text)[:, 0]

    def encode(self, text: str | Sequence[str]) -> Tensor:
        return self(text)[:, None].repeat(1, self.n_repeat, 1)
