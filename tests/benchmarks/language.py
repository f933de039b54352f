"""SmolLM2 on news: what it is calibrated on, and how far its logits are from the float model's."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant.demo import background_articles
from tests.benchmarks.measure import sqnr
from tests.models import smollm2

LENGTH = 512
"""Tokens of a window that is measured."""


class Judged(NamedTuple):
    """How a quantized language model does.

    Attributes:
        perplexity: of the next token, over all windows.
        divergence: mean Kullback-Leibler divergence from the float model, in nats a token.
        agreement: share of tokens for which both expect the same one.
        output_sqnr: of the logits, in dB.
    """

    perplexity: float
    divergence: float
    agreement: float
    output_sqnr: float


@cache
def original() -> smollm2.SmolLM2:
    """Return the float model."""
    return smollm2.load()


def windows(count: int) -> Tensor:
    """Return tokens of the beginning of the news, ``[count, 512]``."""
    return _news()[: count * LENGTH].view(count, LENGTH)


def calibration(count: int, length: int, batch: int) -> list[Tensor]:
    """Return batches of windows of the second half of the news, ``[batch, length]`` each."""
    half = _news()[len(_news()) // 2 :][: count * length].view(count, length)
    return list(torch.split(half, batch))


@torch.no_grad()
def logits(model: nn.Module, count: int) -> Tensor:
    """Return the logits for windows of the beginning of the news, ``[count, 512, 49152]``."""
    return torch.cat([model(ids[None]) for ids in windows(count)])


@cache
def reference(count: int) -> Tensor:
    """Return the float model's logits."""
    return logits(original(), count)


def perplexity(found: Tensor) -> float:
    """Return that of the next token, of logits ``[count, 512, 49152]``."""
    tokens = windows(len(found))[:, 1:].flatten()
    return functional.cross_entropy(found[:, :-1].flatten(0, 1), tokens).exp().item()


def judged(found: Tensor, compared: int | None = None) -> Judged:
    """Return how logits ``[count, 512, 49152]`` do.

    Args:
        found: of a quantized model.
        compared: how many of the windows are compared with the float model; all by default.
    """
    some = found[:compared]
    exact = reference(len(found))[:compared]
    divergence = torch.zeros((), dtype=torch.float64)
    for one, other in zip(exact.flatten(0, 1), some.flatten(0, 1), strict=True):
        log, target = (x.double().log_softmax(-1) for x in (other, one))
        divergence += functional.kl_div(log, target, log_target=True, reduction="sum")
    same = (some.argmax(-1) == exact.argmax(-1)).double().mean()
    count = some.shape[0] * some.shape[1]
    return Judged(perplexity(found), divergence.item() / count, same.item(), sqnr([exact], [some]))


@cache
def _news() -> Tensor:
    return torch.tensor(smollm2.token_ids("\n".join(background_articles())))
