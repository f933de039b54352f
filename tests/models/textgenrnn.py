"""textgenrnn's character model: two LSTM layers, attention over time and a Linear.

Weights: textgenrnn 2.0.0 (MIT), float32, trained on titles of Reddit posts; a Keras file, whose
layout is turned into torch's here.  Text: the news articles of gensim 4.4.0 (LGPL-2.1).
"""

import json
import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models.assets import require, sdist_file, wheel_file

_VOCABULARY = 465
_EMBEDDED = 100
_WIDTH = 128
_CONTEXT = 40
_ARTICLES = 60
_CHARACTERS = 120
_SHORTEST = 60
_GATES = 4


class CharacterModel(nn.Module):
    """Foretells the next character from the forty before it."""

    def __init__(self) -> None:
        """Builds the model with random weights."""
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, _EMBEDDED)
        self.first = nn.LSTM(_EMBEDDED, _WIDTH, batch_first=True)
        self.second = nn.LSTM(_WIDTH, _WIDTH, batch_first=True)
        self.attention = nn.Linear(_EMBEDDED + 2 * _WIDTH, 1, bias=False)
        self.output = nn.Linear(_EMBEDDED + 2 * _WIDTH, _VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the logits [B, 465] of the character that follows ids [B, T]."""
        embedded = self.embedding(ids)
        once, _ = self.first(embedded)
        twice, _ = self.second(once)
        seen = torch.cat((embedded, once, twice), dim=-1)
        weights = self.attention(seen).softmax(dim=1)
        logits: Tensor = self.output((seen * weights).sum(dim=1))
        return logits


def load() -> CharacterModel:
    """Builds the model with its published weights, in evaluation mode."""
    published = _published()
    state = {
        "embedding.weight": published["embedding/embedding/embeddings:0"],
        "attention.weight": published["attention/attention/attention_W:0"].T,
        "output.weight": published["output/output/kernel:0"].T,
        "output.bias": published["output/output/bias:0"],
    }
    for ours, theirs in (("first", "rnn_1"), ("second", "rnn_2")):
        layer = f"{theirs}/{theirs}"
        for name, value in _torch_lstm(
            published[f"{layer}/kernel:0"],
            published[f"{layer}/recurrent_kernel:0"],
            published[f"{layer}/bias:0"],
        ).items():
            state[f"{ours}.{name}_l0"] = value
    model = CharacterModel()
    model.load_state_dict(state)
    return model.eval()


def sample_inputs() -> tuple[Tensor, ...]:
    """Returns sixteen neighboring pieces of an article, [16, 40]."""
    return (article_contexts()[0][:16],)


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Measures how well a model foretells the beginnings of 60 articles.

    Args:
        model: the model, or a quantized form of it.

    Returns:
        The mean of the bits it takes to encode a character.
    """
    contexts, following = article_contexts()
    logits: Tensor = model(contexts)
    nats = functional.cross_entropy(logits, following).item()
    return {"bits_per_character": nats / math.log(2)}


@cache
def article_contexts(skipped: int = 0) -> tuple[Tensor, Tensor]:
    """Returns pieces of 40 characters [N, 40] and the character after each [N].

    Args:
        skipped: how many articles come before the sixty that the pieces are of.
    """
    vocabulary = _vocabulary()
    path = wheel_file("gensim", "4.4.0", "gensim/test/test_data/lee_background.cor")
    contexts, following = [], []
    for article in path.read_text(encoding="utf-8").split("\n")[skipped : skipped + _ARTICLES]:
        ids = torch.tensor([vocabulary.get(letter, 0) for letter in article[:_CHARACTERS]])
        if len(ids) >= _SHORTEST:
            contexts.append(ids[:-1].unfold(0, _CONTEXT, 1))
            following.append(ids[_CONTEXT:])
    return torch.cat(contexts), torch.cat(following)


def _torch_lstm(kernel: Tensor, recurrent_kernel: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Turns the weights of Keras' CuDNNLSTM, gates side by side, into those of `nn.LSTM`.

    Each gate's input weights were stored as cuDNN's own matrix [width, inputs] poured into the
    shape [inputs, width] row by row; its recurrent weights likewise, where it is the same shape.
    """
    input_gates = [
        gate.reshape(gate.shape[1], gate.shape[0]) for gate in kernel.chunk(_GATES, dim=1)
    ]
    input_bias, recurrent_bias = bias.chunk(2)
    return {
        "weight_ih": torch.cat(input_gates),
        "weight_hh": torch.cat(recurrent_kernel.chunk(_GATES, dim=1)),
        "bias_ih": input_bias,
        "bias_hh": recurrent_bias,
    }


def _published() -> dict[str, Tensor]:
    h5py = require("h5py")
    path = sdist_file("textgenrnn", "2.0.0", "textgenrnn/textgenrnn_weights.hdf5")
    tensors: dict[str, Tensor] = {}

    def keep(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            tensors[name] = torch.from_numpy(item[()])

    with h5py.File(path) as file:
        file.visititems(keep)
    return tensors


def _vocabulary() -> dict[str, int]:
    path = sdist_file("textgenrnn", "2.0.0", "textgenrnn/textgenrnn_vocab.json")
    numbered: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    return numbered
