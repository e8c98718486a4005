"""What a model is told of a picture in numbers, beside its prompt: sizes, crop and score (Podell et al. 2023)."""

from collections.abc import Sequence

from ldm.errors import RequestError
from ldm.generation.request import Request, pair

# What the input keys of published configs are to be filled with: fields of a request.
FIELDS = {
    "original_size_as_tuple": "original_size",
    "crop_coords_top_left": "crop",
    "target_size_as_tuple": "target_size",
    "aesthetic_score": "aesthetic_score",
}
SCORE, NO_SCORE = 6.0, 2.5  # of pictures like those that are wanted, and of those that guidance leads away from

Measures = dict[str, tuple[float, ...]]


def measures(request: Request, size: tuple[int, int]) -> tuple[Measures, Measures]:
    """By input key, what the network is told of a picture of `size` (width, height), and what without guidance.

    Where the request is silent the picture was of its own size, is shown whole and is a good one. Heights come first.
    """
    original, target = (pair(text, "x") if text else size for text in (request.original_size, request.target_size))
    told = {
        "original_size_as_tuple": original[::-1],
        "crop_coords_top_left": pair(request.crop or "0,0", ","),
        "target_size_as_tuple": target[::-1],
        "aesthetic_score": (SCORE if request.aesthetic_score is None else request.aesthetic_score,),
    }
    return told, told | {"aesthetic_score": (NO_SCORE,)}


def check(request: Request, keys: Sequence[str]) -> None:
    """Raise RequestError for a number that a model with these input keys is not told, or that it cannot do without."""
    if unknown := [key for key in keys if key not in FIELDS]:
        raise RequestError(f"it is not known here what this model takes as {', '.join(unknown)}")
    for key, name in FIELDS.items():
        if key not in keys and getattr(request, name) is not None:
            raise RequestError(f"this model is not told of {name}: leave --{name} out")
