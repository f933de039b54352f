"""Strategies of hypothesis: tensors, and what there is of schemes and granularities."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mono_quant.base import Scheme
from mono_quant.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor
from mono_quant.schemes import Affine, Codebook, Float8, FloatCast, Microscaling

try:
    from hypothesis import strategies as st
except ImportError as missing:
    raise ImportError(
        "mono_quant.testing.strategies is of hypothesis, which is not installed: "
        "pip install hypothesis; mono_quant.testing.check needs none"
    ) from missing

LARGEST = 1e38
"""Beyond about this, the ends of an asymmetric grid pass the largest float32."""

_SCALES = (torch.float16, torch.bfloat16, torch.float32)


@st.composite
def tensors(draw: st.DrawFn, shape: Sequence[int], low: float = -1e3, high: float = 1e3) -> Tensor:
    """Draw a float32 tensor of finite values, zero and denormal ones among them."""
    count = torch.Size(shape).numel()
    low, high = (float(torch.tensor(end, dtype=torch.float32)) for end in (low, high))
    values = st.floats(low, high, width=32)
    drawn = draw(st.lists(values, min_size=count, max_size=count))
    return torch.tensor(drawn, dtype=torch.float32).reshape(list(shape))


def stacks(shape: Sequence[int] = (2, 3, 8)) -> st.SearchStrategy[Tensor]:
    """Return stacks ``[G, out, in]`` of ordinary, of small, and of any finite values."""
    return st.one_of(tensors(shape), tensors(shape, -1e-3, 1e-3), tensors(shape, -LARGEST, LARGEST))


def granularities(size: int = 4) -> st.SearchStrategy[Granularity]:
    """Return each granularity of weights; groups are of `size` values."""
    every: list[Granularity] = [PerTensor(), PerChannel(), PerGroup(size)]
    return st.sampled_from(every)


def affine(size: int = 4) -> st.SearchStrategy[Affine]:
    """Return even grids of every width, symmetric or with zero points, codes or floats."""
    coded = st.builds(
        Affine,
        bits=st.integers(2, 8),
        symmetric=st.booleans(),
        granularity=granularities(size),
        scale_dtype=st.sampled_from(_SCALES),
    )
    floating = st.builds(
        Affine,
        bits=st.integers(2, 8),
        symmetric=st.just(False),
        granularity=granularities(size),
        scale_dtype=st.sampled_from(_SCALES),
        float_zero_point=st.just(True),
    )
    return st.one_of(coded, floating)


def schemes(size: int = 4) -> st.SearchStrategy[Scheme]:
    """Return schemes of every kind that can take any finite float32, for rows of `size` values."""
    others: list[Scheme] = [
        FloatCast(torch.bfloat16),
        Float8(),
        Codebook.nf4(PerGroup(size)),
        Microscaling("e2m1", "e8m0", PerGroup(size)),
    ]
    return st.one_of(affine(size), st.sampled_from(others))
