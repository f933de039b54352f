"""The Kullback-Leibler threshold, against the definition written as loops."""

import math

import pytest
import torch
from torch import Tensor

from mono_quant import Affine, ConfigurationError, Entropy, MinMax, Scheme
from mono_quant.configurable import Config
from tests.helpers import noise

ASYMMETRIC = Affine(8, symmetric=False)
SYMMETRIC = Affine(8)


def divergence(counts: list[int], kept: int, levels: int) -> float:
    """Return KL(P || Q) of the first `kept` bins pooled; infinite where Q lacks a bin."""
    inner = counts[:kept]
    reference = [*inner[:-1], inner[-1] + sum(counts[kept:])]
    spread = [0.0] * kept
    for level in range(levels):
        places = [place for place in range(kept) if place * levels // kept == level]
        held = [place for place in places if inner[place]]
        for place in held:
            spread[place] = sum(inner[place] for place in held) / len(held)
    total, pooled = sum(reference), sum(spread)
    found = 0.0
    for p, q in zip(reference, spread, strict=True):
        if p and not q:
            return math.inf
        if p:
            found += p / total * math.log(p / total / (q / pooled))
    return found


def best(x: Tensor, exponent: int, levels: int) -> dict[int, float]:
    """Return the divergence by the number of bins kept, for |x| in bins ``2 ** exponent`` wide."""
    places = [int(v / 2.0**exponent) for v in x[x != 0].to(torch.float64).abs().tolist()]
    counts = [0] * (max(places) + 1)
    for place in places:
        counts[place] += 1
    counts[0] = counts[1]
    return {kept: divergence(counts, kept, levels) for kept in range(levels, len(counts) + 1)}


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("kind", ["normal", "laplace", "relu", "gelu"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_threshold_diverges_least(bits: int, kind: str, symmetric: bool) -> None:
    normal = noise(4000) * 1.1
    x = {
        "normal": normal,
        "laplace": normal * noise(4000, seed=1).abs(),
        "relu": normal.relu(),
        "gelu": torch.nn.functional.gelu(normal),
    }[kind]
    observer = Entropy(bins=64)  # few enough for every threshold to be tried
    state = observer.observe(x)
    exponent = int(state.exponent)
    while float(x.abs().max()) / 2.0**exponent >= 64:
        exponent += 1
    one_sided = kind == "relu" and not symmetric
    found = best(x, exponent, 1 << (bits if one_sided else bits - 1))
    least = min(found.values())
    kept = max(kept for kept, value in found.items() if value <= least + 1e-12)
    low, high = observer.calculate_range(state, Affine(bits, symmetric))
    whole = kept == max(found)
    threshold = math.inf if whole else kept * 2.0**exponent
    assert float(high) == min(float(x.max()), threshold)
    assert float(low) == max(float(x.min()), -threshold)


def test_rare_outliers_are_cut_off() -> None:
    x = torch.cat([noise(20000), torch.tensor([40.0])])
    low, high = Entropy().calculate_range(Entropy().observe(x), SYMMETRIC)
    assert 2 < float(high) < 10
    assert -10 < float(low) < -2


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC], ids=repr)
def test_values_that_the_levels_hold_are_not_clipped(scheme: Scheme) -> None:
    x = torch.arange(-40.0, 41.0)
    low, high = Entropy().calculate_range(Entropy().observe(x), scheme)
    assert (float(low), float(high)) == (-40.0, 40.0)


def test_a_block_without_a_distribution_keeps_its_extremes() -> None:
    x = noise(1, 4, 256)
    found = Entropy(bins=300).range_of(x, SYMMETRIC, (1, 1, 256))
    expected = MinMax().range_of(x, SYMMETRIC, (1, 1, 256))
    assert all(map(torch.equal, found, expected))


def test_a_larger_block_is_one_that_was_observed() -> None:
    x = noise(1, 2, 4000)
    low, high = Entropy().range_of(x, SYMMETRIC, (1, 1, 4000))
    for row in (0, 1):
        alone = Entropy().calculate_range(Entropy().observe(x[0, row]), SYMMETRIC)
        assert (float(low[0, row]), float(high[0, row])) == tuple(map(float, alone))


@pytest.mark.parametrize("config", [{"bins": 15}, {"bins": True}, {"bins": 99.5}], ids=str)
@pytest.mark.parametrize("kind", ["entropy", "histogram"])
def test_a_histogram_that_is_none_is_refused(kind: str, config: Config) -> None:
    with pytest.raises(ConfigurationError, match="bins is a whole number, 16 to 1048576"):
        Entropy.from_config({"kind": "entropy", **config})
