"""Affine grids and stacks to try them on."""

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from mono_quant import (
    Affine,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    QParams,
)
from tests.helpers import (
    tensors,
)

SHAPE = (2, 3, 8)
GRANULARITIES = (PerTensor(), PerChannel(), PerGroup(4))
CODED = st.builds(
    Affine,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    granularity=st.sampled_from(GRANULARITIES),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
"""Symmetric grids, and those whose zero points are codes: zero lies on them."""

FLOATING = CODED.map(lambda scheme: attrs.evolve(scheme, symmetric=False, float_zero_point=True))
"""Grids whose zero points are floats."""

GRIDS = st.one_of(CODED, FLOATING)
ANY_FLOATS = tensors(SHAPE, -1e38, 1e38)
SMALL_FLOATS = tensors(SHAPE, -1e-3, 1e-3)
STACKS = st.one_of(tensors(SHAPE), SMALL_FLOATS, ANY_FLOATS)


def qparams_of(scheme: Affine, x: Tensor) -> QParams:
    return scheme.choose_qparams(x, MinMax())


def scale_of(qparams: QParams) -> Tensor:
    assert qparams.scale is not None
    return qparams.scale
