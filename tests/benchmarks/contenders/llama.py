"""A small decoder of the Llama kind with random weights: for speed, not for sense."""

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 1024
BLOCKS = 8
HIDDEN = 2816
VOCABULARY = 32000
HEADS = 16
_HEAD = WIDTH // HEADS
_BASE = 10_000.0
_EPS = 1e-5


class Norm(nn.Module):
    """Scales vectors to a mean square of one, then each element by a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS) * self.weight


class Block(nn.Module):
    """Attention and a gated feed-forward part, each added to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = Norm(), Norm()
        self.query, self.key, self.value, self.output = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, turn: Tensor, seen: Tensor, past: Tensor | None) -> Tensor:
        """Transforms [B, T, width].

        Args:
            x: of the tokens.
            turn: cosines and sines of their places, [2, T, head / 2].
            seen: which tokens each of them attends to, [T, S + T].
            past: keys and values of S tokens before, [2, B, heads, S, head].
        """
        tokens = self.attention_norm(x)
        query, key = (_turned(_heads(part(tokens)), turn) for part in (self.query, self.key))
        value = _heads(self.value(tokens))
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        fed = self.feed_norm(x)
        result: Tensor = x + self.down(functional.silu(self.gate(fed)) * self.up(fed))
        return result


class Llama(nn.Module):
    """Foretells each next token; its keys and values are not handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = Norm()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, past: Tensor | None = None) -> Tensor:
        """Returns logits [B, T, vocabulary].

        Args:
            ids: tokens, [B, T].
            past: keys and values of the S tokens before, [blocks, 2, B, heads, S, head].
        """
        before = 0 if past is None else past.shape[-2]
        places = torch.arange(before, before + ids.shape[1], device=ids.device)
        seen = torch.arange(before + ids.shape[1], device=ids.device) <= places[:, None]
        speeds = _BASE ** (-torch.arange(0, _HEAD, 2, device=ids.device) / _HEAD)
        angles = places.float()[:, None] * speeds
        x = self.embedding(ids)
        turn = torch.stack((angles.cos(), angles.sin())).to(x.dtype)
        for index, block in enumerate(self.blocks):
            x = block(x, turn, seen, None if past is None else past[index])
        logits: Tensor = self.head(self.norm(x))
        return logits


def load() -> Llama:
    """Return the decoder with random weights, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Llama().eval()


def cache(tokens: int) -> Tensor:
    """Return random keys and values of so many tokens, one sequence."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BLOCKS, 2, 1, HEADS, tokens, _HEAD, generator=generator)


def _heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], HEADS, _HEAD).transpose(1, 2)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Turns each pair of halves of [B, heads, T, head] by its token's place."""
    one, two = x.chunk(2, -1)
    cosine, sine = turn.unbind()
    return torch.cat((one * cosine - two * sine, one * sine + two * cosine), -1)
