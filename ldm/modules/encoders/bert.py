"""The text encoder of latent diffusion's text-to-image model: BERT's words, and a transformer of its own."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ldm.errors import ConfigError
from ldm.modules.encoders.files import local_folder
from ldm.modules.encoders.general import AbstractEncoder
from ldm.modules.encoders.text import TextEncoder
from ldm.modules.encoders.tokenizer import TextTokenizer, bert_tokenizer
from ldm.modules.x_transformer import Encoder, TransformerWrapper

VOCABULARY = "vocab.txt"


def bert_vocabulary(place: str | None = None) -> Path:
    """BERT's vocab.txt: `place` or a file in it, else models/bert-base-uncased/, else the Hugging Face cache."""
    if place is not None:
        path = Path(place) / VOCABULARY if Path(place).is_dir() else Path(place)
        if path.is_file():
            return path
        raise ConfigError(f"no BERT vocabulary at {path}")
    for name in ("bert-base-uncased", "google-bert/bert-base-uncased"):
        if folder := local_folder(name, (VOCABULARY,)):
            return folder / VOCABULARY
    raise ConfigError(
        "this model reads words with BERT's vocabulary, which is not on this machine: put vocab.txt of "
        "https://huggingface.co/google-bert/bert-base-uncased in models/bert-base-uncased/"
    )


class BERTTokenizer(AbstractEncoder):
    """Texts to ids (b, max_length). The vocabulary is read at first use, so that a model can be built without it.

    vocabulary: a vocab.txt or its folder; see `bert_vocabulary`, which raises ConfigError where there is none.
    vq_interface: `encode` answers in the form of a VQ model, (None, None, [None, None, ids]).
    """

    def __init__(
        self, device: str = "cuda", vq_interface: bool = True, max_length: int = 77, vocabulary: str | None = None
    ):
        super().__init__()
        self.vq_interface = vq_interface
        self.max_length = max_length
        self.vocabulary = vocabulary

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        return bert_tokenizer(bert_vocabulary(self.vocabulary), self.max_length)

    def forward(self, text: str | Sequence[str]) -> Tensor:
        batch = self.tokenizer(
            text, truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt"
        )
        return batch["input_ids"].to(self.device)

    def encode(self, text: str | Sequence[str]):
        ids = self(text)
        return (None, None, [None, None, ids]) if self.vq_interface else ids

    def decode(self, text):
        return text


class TransformerEmbedder(AbstractEncoder):
    """Ids (b, n) int64 -> states (b, n, n_embed)."""

    def __init__(self, n_embed: int, n_layer: int, vocab_size: int, max_seq_len: int = 77, device: str = "cuda"):
        super().__init__()
        self.transformer = TransformerWrapper(
            num_tokens=vocab_size, max_seq_len=max_seq_len, attn_layers=Encoder(dim=n_embed, depth=n_layer)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.transformer(tokens.to(self.device), return_embeddings=True)

    def encode(self, x: Tensor) -> Tensor:
        return self(x)


class BERTEmbedder(TextEncoder):
    """Texts -> (b, max_seq_len, n_embed), or ids in place of texts without `use_tokenizer`.

    vocabulary: where BERT's vocab.txt is; see BERTTokenizer. `device` is there for old callers.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: str = "cuda",
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        vocabulary: str | None = None,
    ):
        super().__init__()
        self.use_tknz_fn = use_tokenizer
        self.max_length = max_seq_len
        if use_tokenizer:
            self.tknz_fn = BERTTokenizer(vq_interface=False, max_length=max_seq_len, vocabulary=vocabulary)
        self.transformer = TransformerWrapper(
            num_tokens=vocab_size, max_seq_len=max_seq_len,
            attn_layers=Encoder(dim=n_embed, depth=n_layer), emb_dropout=embedding_dropout,
        )

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.tknz_fn.tokenizer

    def encode_ids(self, ids: Tensor) -> Tensor:
        return self.transformer(ids, return_embeddings=True)

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        return super().forward(text) if self.use_tknz_fn else self.encode_ids(text.to(self.device))
