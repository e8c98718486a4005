"""Four ways to compute softmax(q k^T * scale) v, and the one setting that picks among them for the whole process.

    sdpa    torch's fused kernels: no score matrix is ever stored, and nearly everywhere the fastest
    cached  a few query rows at a time, whose scores stay in the processor's cache: the fastest in bfloat16 on a
            processor that computes in it but has no matrix unit, for which the fused kernel is made
    sliced  a few query rows at a time, for devices whose fused kernel stores the whole score matrix
    math    the plain formula with a float32 softmax, as a reference
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

# Most score entries that `sliced` holds at once: 256 MiB in float32.
SLICE_ENTRIES = 2**26

# Score entries that `cached` makes at once for each thread: 2 MiB in bfloat16.
CACHED_ENTRIES = 2**20

# Numbers of float32 in a register: a product of another width than a multiple takes a quarter longer.
REGISTER = 16

# Score entries of a head up to which the fused kernel of processors takes 5 times as long backwards as the formula.
SHORT = 128**2

_method = "sdpa"


def set_attention(method: str) -> str:
    """Choose one of METHODS for every attention layer of the process; gives back the previous choice."""
    global _method
    if method not in METHODS:
        raise ValueError(f"attention must be one of {', '.join(METHODS)}, got {method!r}")
    previous, _method = _method, method
    return previous


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1).

    q: (b, heads, n, d); k, v: (b, heads, m, d); mask: booleans that broadcast to (b, heads, n, m), True where a key may
    be seen. Returns (b, heads, n, d).
    """
    return METHODS[_method](q, k, v, scale, mask)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    if q.requires_grad and q.device.type == "cpu" and q.shape[2] * k.shape[2] <= SHORT:
        return _math(q, k, v, scale, mask)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _cached(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    if mask is not None or q.dtype != torch.bfloat16 or q.device.type != "cpu" or torch.is_grad_enabled():
        return _sdpa(q, k, v, scale, mask)
    if torch.compiler.is_compiling():
        return torch.ops.ldm.attention_in_cache(q, k, v, scale)
    return _in_cache(q, k, v, scale)


def _in_cache(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    (b, heads, n, _), m = q.shape, k.shape[2]
    most = max(1, CACHED_ENTRIES * torch.get_num_threads() // m)  # rows of all heads together
    rows, together = min(n, most), max(1, most // n)
    width = v.shape[-1]
    out = _joinable(q, k, v, scale)
    # Keys and values as the products take them in, or every few rows they would be copied anew.
    k = (k * scale).transpose(-1, -2).contiguous()
    v = pad(v, (0, -width % REGISTER))
    for i in range(b):
        for head in range(0, heads, together):
            some = slice(head, head + together)
            for row in range(0, n, rows):
                scores = q[i, some, row:row + rows] @ k[i, some]
                out[i, some, row:row + rows] = (scores.softmax(dim=-1) @ v[i, some])[..., :width]
    return out


def _joinable(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Room for the result, in the order in which the heads are joined again."""
    b, heads, n, _ = q.shape
    return q.new_empty(b, n, heads, v.shape[-1]).transpose(1, 2)


# To a compiler it is one operator: it would write the loop out, a product at a time.
_operators = torch.library.Library("ldm", "DEF")
_operators.define("attention_in_cache(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")
_operators.impl("attention_in_cache", _in_cache, "CPU")
torch.library.register_fake("ldm::attention_in_cache", _joinable, lib=_operators)


def _math(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    scores = (q * scale) @ k.transpose(-1, -2)  # scaled first: q k^T alone leaves the range of float16
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


def _sliced(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    b, heads, n, _ = q.shape
    rows = max(1, SLICE_ENTRIES // (b * heads * k.shape[2]))
    if rows >= n:
        return _math(q, k, v, scale, mask)
    queries = q.split(rows, dim=2)
    per_row = mask is not None and mask.shape[-2] > 1
    masks = mask.split(rows, dim=-2) if per_row else [mask] * len(queries)
    return torch.cat([_math(part, k, v, scale, seen) for part, seen in zip(queries, masks)], dim=2)


METHODS: dict[str, Callable[..., Tensor]] = {"sdpa": _sdpa, "cached": _cached, "sliced": _sliced, "math": _math}
