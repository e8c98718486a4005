"""The transformer of latent diffusion's text-to-image model, under its checkpoint's names: pre-norm layers (Xiong et
al. 2020), learned absolute positions, attention without biases on queries, keys and values, a GELU perceptron."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class AbsolutePositionalEmbedding(nn.Module):
    """A learned vector a place: x (b, n, ...) -> (1, n, dim)."""

    def __init__(self, dim: int, max_seq_len: int):
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.emb(torch.arange(x.shape[1], device=x.device))[None]


class Attention(nn.Module):
    """Self-attention over `heads` of `dim_head` channels: (b, n, dim) -> (b, n, dim)."""

    def __init__(self, dim: int, dim_head: int = 64, heads: int = 8, dropout: float = 0.0):
        super().__init__()
        inner = dim_head * heads
        self.heads, self.dropout = heads, dropout
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        out = scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.to_out(out.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0):
        super().__init__()
        widen = nn.Sequential(nn.Linear(dim, mult * dim), nn.GELU())
        self.net = nn.Sequential(widen, nn.Dropout(dropout), nn.Linear(mult * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Encoder(nn.Module):
    """`depth` times attention and perceptron, each as x + block(norm(x)); `layers` holds the pairs (norm, block)."""

    def __init__(
        self, dim: int, depth: int, heads: int = 8, dim_head: int = 64,
        attn_dropout: float = 0.0, ff_dropout: float = 0.0,
    ):
        super().__init__()
        self.dim = dim
        blocks = []
        for _ in range(depth):
            blocks += [Attention(dim, dim_head, heads, attn_dropout), FeedForward(dim, dropout=ff_dropout)]
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(dim), block]) for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in self.layers:
            x = x + block(norm(x))
        return x


class TransformerWrapper(nn.Module):
    """Tokens (b, n) int64 -> logits (b, n, num_tokens), or the states (b, n, dim) before them."""

    def __init__(self, *, num_tokens: int, max_seq_len: int, attn_layers: Encoder, emb_dropout: float = 0.0):
        super().__init__()
        dim = attn_layers.dim
        self.max_seq_len, self.num_tokens = max_seq_len, num_tokens
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = AbsolutePositionalEmbedding(dim, max_seq_len)
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.attn_layers = attn_layers
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens)
        nn.init.normal_(self.token_emb.weight, std=0.02)

    def forward(self, x: Tensor, return_embeddings: bool = False) -> Tensor:
        states = self.emb_dropout(self.token_emb(x) + self.pos_emb(x))
        states = self.norm(self.attn_layers(states))
        return states if return_embeddings else self.to_logits(states)
