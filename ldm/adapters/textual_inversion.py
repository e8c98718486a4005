"""New words for a text encoder, each with a vector or several of its own (Textual Inversion, Gal et al. 2022)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.names import text_encoders
from ldm.checkpoint import read_object
from ldm.checkpoint.unpickle import StandIn
from ldm.errors import CheckpointError, RequestError
from ldm.modules.encoders.text import TextEncoder

logger = logging.getLogger(__name__)

# The family that vectors are for, by their widths: one for each text encoder of a model.
FAMILIES = {
    (768,): "Stable Diffusion 1",
    (1024,): "Stable Diffusion 2",
    (768, 1280): "Stable Diffusion XL",
    (1280,): "latent-diffusion text-to-image 1.45B",
}
STATE_ENDS = (".weight", ".bias", ".alpha")  # of names in the state dict of a network


@dataclass(frozen=True)
class Word:
    """What a prompt says, and the vectors (n, width) that n tokens then stand for, for each text encoder."""

    text: str
    vectors: tuple[Tensor, ...]
    path: Path

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(vectors.shape[1] for vectors in self.vectors)


class Added:
    """New words in a model: `undo` takes them out again; of several, the last first."""

    def __init__(self, undone: list[tuple[TextEncoder, int, dict[str, list[int]]]]):
        self._undone = undone

    def undo(self) -> None:
        for encoder, size, words in self._undone:
            resize(table(encoder), table(encoder).weight[:size].clone())
            encoder.tokenizer.set_words(words)
        self._undone = []


def add_words(model: nn.Module, words: Sequence[Word]) -> Added:
    """Give the text encoders of a model more words: rows of their tables, and ids for the tokenizers to find them.

    A word counts in prompts from then on, whatever the vocabulary had for it. Raises RequestError where the model reads
    no text or two words are the same, CheckpointError where the vectors have not the width of its encoders; the model
    is then untouched.
    """
    encoders = text_encoders(model)
    own = tuple(table(encoder).embedding_dim for encoder in encoders)
    taken: dict[str, Path] = {}
    for word in words:
        check_fit(word, own)
        if other := taken.get(word.text.lower()):
            raise RequestError(f"{other} and {word.path} both bring the word {word.text!r}: "
                               f"name one of them otherwise, --embedding {word.path}:WORD")
        taken[word.text.lower()] = word.path
    undone = []
    for i, encoder in enumerate(encoders):
        old, tokenizer = table(encoder), encoder.tokenizer
        undone.append((encoder, old.num_embeddings, tokenizer.words))
        start, ids = old.num_embeddings, {}
        for word in words:
            ids[word.text] = list(range(start, start + len(word.vectors[i])))
            start += len(word.vectors[i])
        resize(old, torch.cat([old.weight, *(word.vectors[i].to(old.weight) for word in words)]))
        tokenizer.set_words({**tokenizer.words, **ids})
    for word in words:
        logger.info("%s: in prompts, %r stands for %d learned tokens", word.path, word.text, len(word.vectors[0]))
    return Added(undone)


def table(encoder: TextEncoder) -> nn.Embedding:
    """The vectors of an encoder's vocabulary: (words, width)."""
    return next(module for name, module in encoder.named_modules() if name.rpartition(".")[2].startswith("token_emb"))


def resize(embedding: nn.Embedding, weight: Tensor) -> None:
    embedding.weight = nn.Parameter(weight.detach(), requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = len(weight)


def check_fit(word: Word, own: tuple[int, ...]) -> None:
    """Raise an error where the vectors of a word are not of the widths of a model's text encoders."""
    if not own:
        raise RequestError(f"this model reads no text, so {word.path} has no place in it")
    if word.widths != own:
        raise CheckpointError(f"{word.path} does not fit the model: the vectors of {word.text!r} are "
                              f"{describe(word.widths)}, the words of this model are {describe(own)}")


def describe(widths: tuple[int, ...]) -> str:
    text = " and ".join(map(str, widths)) + " wide"
    return f"{text} ({FAMILIES[widths]})" if widths in FAMILIES else text


def read_words(path: str | Path, text: str | None = None) -> list[Word]:
    """The words of an embedding file of the original (.pt), of AUTOMATIC1111's web UI, of Kohya's trainer or diffusers.

    text: what the prompts will say; None takes the file's own name for it, else the name of the file. Raises
    CheckpointError with what is wrong with the file, RequestError where `text` is given for several words.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no embedding file {path}")
    found = named_vectors(read_object(path), path)
    if text is not None:
        if len(found) > 1:
            raise RequestError(f"{path} has {len(found)} words, {', '.join(found)}: they keep their own names")
        found = {text: next(iter(found.values()))}
    return [Word(name, tuple(check_vectors(one, name, path) for one in vectors), path)
            for name, vectors in found.items()]


def named_vectors(tree: Any, path: Path) -> dict[str, tuple[Tensor, ...]]:
    """{word: vectors for each text encoder} from what a file holds."""
    match tree:
        case {"string_to_param": params}:
            found = parameters(params)
            if set(found) == {"*"} and isinstance(tree.get("name"), str) and tree["name"].strip():
                found = {tree["name"]: found["*"]}  # the web UI saves every word under a star
        case {"emb_params": vectors}:
            found = {path.stem: vectors}
        case {"clip_l": first, "clip_g": second}:  # for the two encoders of Stable Diffusion XL
            return {path.stem: (first, second)}
        case dict():
            found = tree
        case _:
            found = {}
    if not found or not all(map(is_word, found, found.values())):
        raise CheckpointError(f"{path} holds no embedding: a .pt, .bin or .safetensors file of learned words is needed")
    return {name: (vectors,) for name, vectors in found.items()}


def is_word(name: Any, vectors: Any) -> bool:
    """Whether an entry of a file is one of a learned word, and not of a network."""
    named = isinstance(name, str) and name.strip() and not name.endswith(STATE_ENDS)
    return bool(named) and isinstance(vectors, Tensor)


def parameters(params: Any) -> Mapping[Any, Any]:
    """The mapping behind a torch.nn.ParameterDict, which a pickle tells as the state of an object."""
    if isinstance(params, StandIn) and isinstance(params.state, dict):
        params = params.state.get("_parameters")
    return params if isinstance(params, dict) else {}


def check_vectors(vectors: Tensor, word: str, path: Path) -> Tensor:
    """Vectors (n, width) in float32 from those of a file, which may be one alone."""
    if not isinstance(vectors, Tensor) or vectors.ndim not in (1, 2) or not vectors.numel():
        what = f"a tensor {tuple(vectors.shape)}" if isinstance(vectors, Tensor) else f"a {type(vectors).__name__}"
        raise CheckpointError(f"{path} holds no embedding: it has {what} for {word!r}, and n vectors are needed")
    rows = torch.atleast_2d(vectors).to(torch.float32, copy=True)
    if not torch.isfinite(rows).all():
        raise CheckpointError(f"{path} is damaged: the vectors of {word!r} are not finite")
    return rows
