"""News documents with human similarity ratings (Lee and Pincombe), and labelled review lines.

All of it is test data of the gensim distribution, read as plain text: gensim is not imported.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mono_quant.demo._files import packaged_file
from mono_quant.errors import InputError


class PolarityLine(NamedTuple):
    """One line of a film review and whether it praises the film."""

    text: str
    positive: bool


def lee_documents() -> list[str]:
    """Returns the 50 short news documents that people compared with each other."""
    return _lines("lee.cor")


def human_similarities() -> Tensor:
    """Returns how similar people found each pair of documents: [50, 50], from 0 to 1."""
    rows = [[float(cell) for cell in line.split()] for line in _lines("similarities0-1.txt")]
    return torch.tensor(rows, dtype=torch.float64)


def background_articles() -> list[str]:
    """Returns 300 news articles other than the rated ones, to calibrate on."""
    return _lines("lee_background.cor")


def polarity_lines() -> list[PolarityLine]:
    """Returns 200 lines of film reviews with their labels."""
    labelled = (line.partition(" ") for line in _lines("pang_lee_polarity.cor"))
    return [PolarityLine(text, label.endswith("pos")) for label, _, text in labelled]


def pearson_with_humans(embeddings: Tensor) -> float:
    """Correlates the similarities of the documents with what people said.

    Args:
        embeddings: one normalized embedding for each of `lee_documents()`, in their order.

    Returns:
        Pearson's correlation over the 1225 pairs of documents.
    """
    return _pearson(*_paired_similarities(embeddings))


def spearman_with_humans(embeddings: Tensor) -> float:
    """Correlates the ranks of the similarities of the documents with those people gave.

    Args:
        embeddings: one normalized embedding for each of `lee_documents()`, in their order.

    Returns:
        Spearman's rank correlation over the 1225 pairs of documents.
    """
    computed, rated = _paired_similarities(embeddings)
    return _pearson(_ranks(computed), _ranks(rated))


def polarity_accuracy(embeddings: Tensor, *, neighbors: int = 9) -> float:
    """Guesses the label of each review line from the lines nearest to it.

    Args:
        embeddings: one normalized embedding for each of `polarity_lines()`, in their order.
        neighbors: how many of the other lines vote on the label; odd, so that none ties.

    Returns:
        The share of the lines whose label was guessed.
    """
    positive = torch.tensor([line.positive for line in polarity_lines()])
    _require_one_each(embeddings, len(positive))
    similarity = _similarities(embeddings).fill_diagonal_(-torch.inf)
    votes = positive[similarity.topk(neighbors).indices]
    guessed = votes.double().mean(dim=1) > 0.5
    return (guessed == positive).double().mean().item()


def _lines(name: str) -> list[str]:
    path = packaged_file("gensim", f"gensim/test/test_data/{name}")
    # Latin-1 holds bytes that `str.splitlines` takes for line ends, so split on "\n" alone.
    return path.read_text(encoding="latin-1").strip().split("\n")


def _similarities(embeddings: Tensor) -> Tensor:
    exact = embeddings.detach().to(device="cpu", dtype=torch.float64)
    return exact @ exact.T


def _paired_similarities(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    rated = human_similarities()
    _require_one_each(embeddings, len(rated))
    first, second = torch.triu_indices(len(rated), len(rated), offset=1).unbind()
    return _similarities(embeddings)[first, second], rated[first, second]


def _require_one_each(embeddings: Tensor, count: int) -> None:
    if embeddings.ndim != 2 or len(embeddings) != count:
        shape = list(embeddings.shape)
        raise InputError(f"expected {count} embeddings, one a row, but the shape is {shape}")


def _pearson(left: Tensor, right: Tensor) -> float:
    return torch.corrcoef(torch.stack((left, right)))[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1; equal values share the mean of the ranks that they take up."""
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + 1 + up_to).double() / 2
