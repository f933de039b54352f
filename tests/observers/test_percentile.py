"""Percentiles, against torch.quantile."""

import pytest
import torch

from mono_quant import Affine, ConfigurationError, Percentile, PerChannel, PerGroup, PerTensor
from mono_quant.configurable import Config
from mono_quant.numerics.granularity import Granularity
from tests.helpers import noise

SCHEME = Affine(8, symmetric=False)


@pytest.mark.parametrize("p", [60.0, 90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(8)], ids=repr)
def test_a_weights_percentiles_are_those_of_each_block(p: float, granularity: Granularity) -> None:
    x = noise(2, 3, 64)
    block = granularity.block_size((2, 3, 64))
    low, high = Percentile(p).range_of(x, SCHEME, block)
    rows = x.reshape(low.numel(), -1).to(torch.float64)
    shares = torch.tensor([1 - p / 100, p / 100], dtype=torch.float64)
    expected = torch.quantile(rows, shares, dim=1).to(torch.float32)
    torch.testing.assert_close(low.flatten(), expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(high.flatten(), expected[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("p", [99.0, 99.9, 99.999])
def test_percentiles_of_batches_are_those_of_all_values_to_the_width_of_a_bin(p: float) -> None:
    observer = Percentile(p)
    batches = [noise(3000, seed=seed) * (1 + seed) for seed in range(5)]
    state = observer.observe(batches[0])
    for batch in batches[1:]:
        state = observer.merge(state, observer.observe(batch))
    low, high = observer.calculate_range(state, SCHEME)
    values, width = torch.cat(batches).to(torch.float64), 2.0 ** int(state.exponent)
    assert width <= float(values.max() - values.min()) / 4000
    assert abs(float(low) - float(torch.quantile(values, 1 - p / 100))) <= width
    assert abs(float(high) - float(torch.quantile(values, p / 100))) <= width


def test_a_far_percentile_of_a_sampled_tensor_is_exact() -> None:
    x = noise(1500, 1000) ** 3
    observer = Percentile(99.999)  # cuts off 15 values at each end
    state = observer.observe(x)
    low, high = observer.calculate_range(state, SCHEME)
    exact = torch.quantile(x.flatten().to(torch.float64), torch.tensor([1e-5, 1 - 1e-5]).double())
    width = 2.0 ** int(state.exponent)
    assert abs(float(low) - float(exact[0])) <= width
    assert abs(float(high) - float(exact[1])) <= width


@pytest.mark.parametrize("config", [{"p": 50}, {"p": 100.1}, {"p": 0.999}, {"p": -1}], ids=str)
def test_what_is_no_percentile_is_refused(config: Config) -> None:
    with pytest.raises(ConfigurationError, match="p is in percent, above 50 and at most 100"):
        Percentile.from_config({"kind": "percentile", **config})
