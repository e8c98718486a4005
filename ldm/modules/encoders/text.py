"""Encoders of text: prompts in, states (b, n, c) for cross-attention out."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.errors import CheckpointError, ConfigError
from ldm.modules.encoders.clip import ClipConfig, ClipTextTransformer
from ldm.modules.encoders.tokenizer import CLIP_VOCABULARY, TextTokenizer, clip_tokenizer, read_json
from ldm.prompt import chunk

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


class AbstractEncoder(nn.Module):
    """Anything that `cond_stage_config` may name: `encode` turns what the data holds into a condition."""

    def encode(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} has no encode")

    @property
    def device(self) -> torch.device:
        """Where inputs go: where the weights are, unless public code has set another place."""
        chosen = self.__dict__.get("chosen_device")
        return chosen or next((p.device for p in self.parameters()), torch.device("cpu"))

    @device.setter
    def device(self, device: str | torch.device) -> None:
        self.__dict__["chosen_device"] = torch.device(device)


class TextEncoder(AbstractEncoder):
    """A `tokenizer`, a `max_length` in tokens with both marks, and `encode_ids`: (b, n) int64 -> (b, n, c)."""

    tokenizer: TextTokenizer
    max_length: int

    def encode_ids(self, ids: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no encode_ids")

    def clean(self, text: str) -> str:
        """The text that the tokenizer is given."""
        return text

    def dropped(self, text: str) -> str:
        """The end of a prompt that does not fit in `max_length` tokens, as it was written; "" where all of it fits."""
        text = self.clean(text)
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        room = self.max_length - 2
        return text[offsets[room][0]:].strip() if len(offsets) > room else ""

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Ids (b, max_length) of each text, padded or cut; what is cut is quoted in a warning."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in dict.fromkeys(texts):
            if lost := self.dropped(text):
                logger.warning("the prompt is longer than %d tokens; this was dropped: %r", self.max_length - 2, lost)
        batch = self.tokenizer(
            [self.clean(text) for text in texts],
            truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt",
        )
        return batch["input_ids"].to(self.device)

    def forward(self, text: str | Sequence[str]) -> Tensor:
        return self.encode_ids(self.tokenize(text))

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """One text or b texts -> (b, n, c) in the weights' dtype."""
        return self(text)

    def chunks(self, text: str) -> list[list[int]]:
        """The ids of a prompt in runs that each fit between two marks, cut as `ldm.prompt.chunk` does."""
        ids = self.tokenizer(self.clean(text), add_special_tokens=False)["input_ids"]
        return chunk(ids, self.tokenizer.convert_ids_to_tokens(ids), self.max_length - 2)

    def encode_long(self, texts: Sequence[str], count: int | None = None) -> Tensor:
        """Encode each prompt in `count` chunks, one after the other: (b, count * max_length, c).

        count defaults to what the longest text needs; a prompt and its negative need the larger of the two. A text with
        fewer chunks is filled up with empty ones. Raises ValueError where `count` is too small.
        """
        rows = [self.chunks(text) for text in texts]
        need = max(map(len, rows))
        count = need if count is None else count
        if count < need:
            raise ValueError(f"the longest prompt needs {need} chunks, got count={count}")
        bos, eos, pad = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        filled = [run for row in rows for run in row + [[]] * (count - len(row))]
        ids = [[bos, *run, eos] + [pad] * (self.max_length - 2 - len(run)) for run in filled]
        states = self.encode_ids(torch.tensor(ids, device=self.device))  # (b * count, max_length, c)
        return states.unflatten(0, (len(texts), count)).flatten(1, 2)


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
    folder = Path(version)
    if not folder.is_dir():
        known = ", ".join(CLIP_VERSIONS)
        raise ConfigError(f"no CLIP text encoder {version!r}: it must be a folder with config.json, or one of {known}")
    config = clip_config(folder)
    has_words = any((folder / name).exists() for name in ("vocab.json", "tokenizer.json"))
    if not has_words and config.vocabulary != CLIP_VOCABULARY:
        raise ConfigError(f"{folder} has no tokenizer (vocab.json, merges.txt), and its vocabulary is not CLIP's own")
    transformer = ClipTextTransformer(config)
    if not transformer.text_model.final_layer_norm.weight.is_meta:
        transformer.load_state_dict(clip_weights(folder, transformer.state_dict()))
    return clip_tokenizer(folder if has_words else None), transformer


def clip_config(folder: Path) -> ClipConfig:
    """The text tower that a transformers config.json describes, alone or as the `text_config` of a whole CLIP."""
    found = read_json(folder / "config.json")
    found = found.get("text_config") or found
    try:
        return ClipConfig(
            width=found["hidden_size"], layers=found["num_hidden_layers"], heads=found["num_attention_heads"],
            ff=found["intermediate_size"], act=found.get("hidden_act", "quick_gelu"),
            eps=found.get("layer_norm_eps", 1e-5), vocabulary=found.get("vocab_size", CLIP_VOCABULARY),
            length=found.get("max_position_embeddings", 77),
            # Old configs say 2, which no CLIP ever used: its end mark is the largest id.
            eos=None if found.get("eos_token_id", 2) == 2 else found["eos_token_id"],
        )
    except KeyError as error:
        raise ConfigError(f"{folder / 'config.json'} does not describe a CLIP text encoder: no {error}") from error


def clip_weights(folder: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a transformers folder, whose keys may lack `text_model.`, under the names in `wanted`."""
    found = {
        key if key.startswith("text_model.") else f"text_model.{key}": weight
        for key, weight in read_weights(folder).items()
    }
    ids = "text_model.embeddings.position_ids"
    found[ids] = wanted[ids]
    if missing := sorted(set(wanted) - set(found)):
        raise CheckpointError(f"the weights in {folder} lack {', '.join(missing)}")
    return {key: found[key] for key in wanted}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The state dict of a folder in the transformers form: model.safetensors, else pytorch_model.bin (tensors only)."""
    try:
        if (path := folder / "model.safetensors").exists():
            from safetensors.torch import load_file

            return load_file(path)
        if (path := folder / "pytorch_model.bin").exists():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot read the weights {path}: {error}") from error
    raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
