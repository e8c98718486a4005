"""Tokenizers that are called as those of transformers are, on the `tokenizers` library that transformers rests on.

Importing `transformers` for its CLIPTokenizer adds about a second to every start, `tokenizers` a fiftieth of that.
"""

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ldm.errors import ConfigError
from ldm.modules.encoders.files import read_json

CLIP_VOCABULARY = 49408
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Encoding(dict):
    """What a tokenizer returns: a dictionary whose entries are attributes too."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class TextTokenizer:
    """A vocabulary behind the calls that public code makes on a Hugging Face tokenizer.

    Texts become [bos] ids [eos] [pad] ...; `bos_token_id`, `eos_token_id` and `pad_token_id` are those ids. `unk_token`
    stands for what the vocabulary lacks. The `marks` are read as one token each where a text spells them out. `words`
    are those that `set_words` has set.
    """

    def __init__(
        self, backend: Tokenizer, bos_token: str, eos_token: str, pad_token: str, unk_token: str,
        marks: Sequence[str], model_max_length: int = 77,
    ):
        backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
        self.backend_tokenizer = backend
        self.bos_token, self.eos_token, self.pad_token, self.unk_token = bos_token, eos_token, pad_token, unk_token
        self.model_max_length = model_max_length
        self.set_words({})

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_length: bool = False,
        return_offsets_mapping: bool = False,
        return_overflowing_tokens: bool = False,
    ) -> Encoding:
        """Encode one text or several as `input_ids` and `attention_mask`; `length`, `offset_mapping` on request.

        Lists, flat for one text alone, or with return_tensors="pt" int64 tensors (b, n). padding: False, True (to the
        longest) or "max_length"; truncation cuts to `max_length`. Raises ValueError for what is not offered here.
        """
        if return_tensors not in (None, "pt") or return_overflowing_tokens:
            raise ValueError("this tokenizer returns lists or return_tensors='pt', and no overflowing tokens")
        single = isinstance(text, str)
        limit = max_length or self.model_max_length
        room = limit - 2 * add_special_tokens if truncation else None
        # One text at a time: encode_batch starts a pool of threads, which complains when a data loader forks later.
        found = [self._encode(t) for t in ([text] if single else text)]
        ids, offsets = [ids[:room] for ids, _ in found], [spans[:room] for _, spans in found]
        if add_special_tokens:
            ids = [[self.bos_token_id, *row, self.eos_token_id] for row in ids]
            offsets = [[(0, 0), *row, (0, 0)] for row in offsets]
        width = {"max_length": limit, "longest": max(map(len, ids), default=0)}
        width = width["longest" if padding is True else padding] if padding else 0
        masks = [[1] * len(row) + [0] * (width - len(row)) for row in ids]
        result = Encoding(
            input_ids=[row + [self.pad_token_id] * (width - len(row)) for row in ids],
            attention_mask=masks,
        )
        if return_length:
            result["length"] = [len(row) for row in masks]
        if return_offsets_mapping:
            result["offset_mapping"] = [row + [(0, 0)] * (width - len(row)) for row in offsets]
        if return_tensors:
            return Encoding({name: torch.tensor(rows) for name, rows in result.items()})
        return Encoding({name: rows[0] for name, rows in result.items()}) if single else result

    def set_words(self, words: Mapping[str, Sequence[int]]) -> None:
        """Read each of these words as its ids, whatever the vocabulary makes of it, in place of any set before.

        They are found as whole words, the longest first, in upper and lower case.
        """
        self.words = {word: list(ids) for word, ids in words.items()}
        self._longest_first = sorted(self.words, key=len, reverse=True)
        self._word = re.compile("|".join(f"({_whole(word)})" for word in self._longest_first), re.IGNORECASE)

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text without marks, and where in it each stands."""
        ids, spans, start = [], [], 0
        for match in self._word.finditer(text) if self.words else ():
            self._encode_plain(text[start:match.start()], start, ids, spans)
            own = self.words[self._longest_first[match.lastindex - 1]]
            ids += own
            spans += [match.span()] * len(own)
            start = match.end()
        self._encode_plain(text[start:], start, ids, spans)
        return ids, spans

    def _encode_plain(self, text: str, start: int, ids: list[int], spans: list[tuple[int, int]]) -> None:
        """Append what the vocabulary makes of a text that stands at `start` of another."""
        found = self.backend_tokenizer.encode(text, add_special_tokens=False)
        ids += found.ids
        spans += [(start + left, start + right) for left, right in found.offsets]

    @property
    def bos_token_id(self) -> int:
        return self.convert_tokens_to_ids(self.bos_token)

    @property
    def eos_token_id(self) -> int:
        return self.convert_tokens_to_ids(self.eos_token)

    @property
    def pad_token_id(self) -> int:
        return self.convert_tokens_to_ids(self.pad_token)

    @property
    def vocab_size(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab()

    def add_tokens(self, tokens: str | Sequence[str]) -> int:
        """Give new words an id each after the last one, and return how many were new."""
        return self.backend_tokenizer.add_tokens([tokens] if isinstance(tokens, str) else list(tokens))

    def tokenize(self, text: str) -> list[str]:
        return self.backend_tokenizer.encode(text, add_special_tokens=False).tokens

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self(text, add_special_tokens=add_special_tokens)["input_ids"]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text that ids stand for, in the spelling of the vocabulary: lower case, words apart."""
        ids = [int(i) for i in token_ids]
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens).strip()

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        if isinstance(tokens, str):
            found = self.backend_tokenizer.token_to_id(tokens)
            return self.backend_tokenizer.token_to_id(self.unk_token) if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str]:
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(int(i)) for i in ids]


def _whole(word: str) -> str:
    """The pattern of a word that is no part of a longer one, whatever space is in it."""
    left, right = r"(?<!\w)" if re.match(r"\w", word) else "", r"(?!\w)" if re.search(r"\w\Z", word) else ""
    return left + r"\s+".join(map(re.escape, word.split())) + right


@cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-pair vocabulary and merges, from the file that comes with the package (data/NOTICE).

    Ids in order: 256 bytes, the same at the end of a word, one for each merge, and the two marks (Radford et al. 2021).
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols += [symbol + "</w>" for symbol in symbols]
    path = files("ldm.modules.encoders") / "data" / "bpe_simple_vocab_16e6.txt.gz"
    with path.open("rb") as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        next(lines)  # the file's version
        merges = [tuple(line.split()) for line in islice(lines, CLIP_VOCABULARY - len(symbols) - 2)]
    words = [*symbols, *map("".join, merges), START, END]
    return {word: index for index, word in enumerate(words)}, merges


def clip_tokenizer(folder: Path | None = None, pad_token: str = END, max_length: int = 77) -> TextTokenizer:
    """CLIP's tokenizer: lower case, byte-pair encoding, marks around each text.

    folder: one in the transformers form, whose own vocab.json and merges.txt are then used. The default pads with the
    end mark, as openai/clip-vit-large-patch14 does; `pad_token="!"` is id 0, as in OpenAI's and open_clip's own code.
    """
    if folder is None:
        vocabulary, merges = clip_vocabulary()
    else:
        vocabulary, merges = read_vocabulary(folder)
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        named = settings.get("pad_token", pad_token)
        pad_token = named["content"] if isinstance(named, dict) else named
    backend = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=END))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(CLIP_WORD), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    return TextTokenizer(backend, START, END, pad_token, END, (START, END), max_length)


def write_clip_tokenizer(folder: Path, pad_token: str = END) -> None:
    """Write CLIP's tokenizer as a new folder in the transformers form."""
    vocabulary, merges = clip_vocabulary()
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **marks}
    folder.mkdir(parents=True)
    for name, content in (("vocab", vocabulary), ("special_tokens_map", marks), ("tokenizer_config", settings)):
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def tokenizer_folder(encoder: Path) -> Path | None:
    """Where the vocabulary of a text encoder's folder is: in it, or in `tokenizer` beside it; None if in neither."""
    names = ("vocab.json", "tokenizer.json")
    places = (encoder, encoder.parent / "tokenizer")
    return next((place for place in places if any((place / name).is_file() for name in names)), None)


def bert_tokenizer(vocabulary: Path, max_length: int = 77) -> TextTokenizer:
    """BERT's uncased WordPiece tokenizer (Devlin et al. 2019) from its vocab.txt, one token a line."""
    unknown, start, end, pad = "[UNK]", "[CLS]", "[SEP]", "[PAD]"
    backend = Tokenizer(models.WordPiece.from_file(str(vocabulary), unk_token=unknown))
    if missing := [mark for mark in (unknown, start, end, pad) if backend.token_to_id(mark) is None]:
        raise ConfigError(f"{vocabulary} is not BERT's vocabulary: it lacks {', '.join(missing)}")
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    marks = [mark for mark in (pad, unknown, start, end, "[MASK]") if backend.token_to_id(mark) is not None]
    return TextTokenizer(backend, start, end, pad, unknown, marks, max_length)


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a tokenizer folder: vocab.json with merges.txt, or tokenizer.json."""
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        rows = [line for line in lines if line.strip() and not line.startswith("#version")]
        return read_json(folder / "vocab.json"), [tuple(row.split()) for row in rows]
    if (folder / "tokenizer.json").exists():
        model = read_json(folder / "tokenizer.json")["model"]
        return model["vocab"], [tuple(m.split()) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    raise ConfigError(f"{folder} has no tokenizer: vocab.json with merges.txt, or tokenizer.json, is needed")
