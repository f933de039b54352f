"""The built-in strategies keep the laws that others are asked to keep."""

from collections.abc import Callable

import torch
from hypothesis import given
from torch import Tensor, nn

from mono_quant import (
    AWQ,
    GPTQ,
    HQQ,
    MSE,
    Affine,
    AttentionQuantizer,
    Auto,
    BiasCorrection,
    BilinearQuantizer,
    Codebook,
    ConvQuantizer,
    ConvTransposeQuantizer,
    EmbeddingQuantizer,
    Entropy,
    EqualizeLayers,
    FittedCodebook,
    Float8,
    FloatCast,
    FoldBatchNorm,
    Hessian,
    Histogram,
    LayerQuantizer,
    LearnedRounding,
    LinearLikeQuantizer,
    LinearQuantizer,
    Microscaling,
    MinMax,
    MovingAverage,
    Outliers,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    RecurrentCellQuantizer,
    RecurrentQuantizer,
    Rotate,
    RoundToNearest,
    SafetensorsSerializer,
    Scheme,
    SmoothQuant,
    TorchSerializer,
    TuneScales,
)
from mono_quant.configurable import registered
from mono_quant.kernels import KERNELS
from mono_quant.layers.containers import (
    MultiheadAttentionContainer,
    TransformerEncoderContainer,
)
from mono_quant.schemes.outliers import ColumnPeaks
from mono_quant.testing import (
    Check,
    ContainerCase,
    KernelCase,
    LayerCase,
    check_stack,
    parametrize_with_checks,
)
from mono_quant.testing.models import noise
from mono_quant.testing.strategies import schemes, stacks
from tests.test_configurable import VARIED

GRANULARITIES = (PerTensor(), PerChannel(), PerGroup(4))
E4M3 = torch.float8_e4m3fn
SCHEMES: list[Scheme] = [
    *(
        Affine(bits, symmetric, granularity)
        for bits in (2, 4, 8)
        for symmetric in (True, False)
        for granularity in GRANULARITIES
    ),
    Affine(3, False, PerGroup(8), torch.float32),
    Affine(4, False, PerGroup(8), float_zero_point=True),
    Affine(8, False, PerChannel(), torch.bfloat16, float_zero_point=True),
    FloatCast(),
    FloatCast(torch.bfloat16),
    Float8(),
    Float8(torch.float8_e5m2, PerTensor(), torch.bfloat16),
    Codebook.nf4(PerGroup(4)),
    Codebook.nf4(PerTensor(), torch.float32),
    Codebook.nf4(PerGroup(4), E4M3),
    Codebook((-1.0, -0.5, 0.0, 1.0)),
    FittedCodebook(4, PerGroup(4)),
    FittedCodebook(3, PerTensor(), E4M3),
    FittedCodebook(2, PerChannel(), torch.bfloat16),
    FittedCodebook(8, PerChannel(), E4M3),
    Microscaling("e2m1", "e8m0", PerGroup(4)),
    Microscaling("e3m2", "e8m0", PerGroup(8)),
    Microscaling("e4m3", "e8m0", PerGroup(8)),
    Microscaling("e5m2", "e4m3", PerGroup(2)),
    Microscaling.nvfp4(),
    Outliers(Affine(4, False, PerGroup(4)), 2),
    Outliers(),
]


def layer(
    quantizer: LayerQuantizer, make: Callable[[], nn.Module], *inputs: Tensor, **names: Tensor
) -> LayerCase:
    return LayerCase(quantizer, make, inputs)


LAYERS = [
    layer(LinearQuantizer(), lambda: nn.Linear(64, 32), noise(5, 64)),
    layer(BilinearQuantizer(), lambda: nn.Bilinear(8, 16, 12), noise(5, 8), noise(5, 16)),
    layer(ConvQuantizer(), lambda: nn.Conv1d(8, 16, 8, groups=2), noise(2, 8, 20)),
    layer(ConvQuantizer(), lambda: nn.Conv2d(8, 8, (4, 2), groups=8), noise(2, 8, 6, 6)),
    layer(ConvQuantizer(), lambda: nn.Conv3d(4, 6, 2, padding=1), noise(2, 4, 3, 4, 5)),
    layer(
        ConvTransposeQuantizer(),
        lambda: nn.ConvTranspose2d(8, 6, (2, 4), stride=2, groups=2),
        noise(2, 8, 5, 5),
    ),
    layer(EmbeddingQuantizer(), lambda: nn.Embedding(40, 64), torch.arange(40)),
    layer(EmbeddingQuantizer(), lambda: nn.EmbeddingBag(40, 64), torch.arange(40).reshape(8, 5)),
    layer(AttentionQuantizer(), lambda: nn.MultiheadAttention(64, 4), *[noise(7, 2, 64)] * 3),
    layer(RecurrentQuantizer(), lambda: nn.LSTM(64, 64, bidirectional=True), noise(6, 2, 64)),
    layer(RecurrentQuantizer(), lambda: nn.GRU(64, 64, 2), noise(6, 2, 64)),
    layer(RecurrentCellQuantizer(), lambda: nn.GRUCell(64, 64), noise(3, 64)),
    layer(
        LinearLikeQuantizer("torch.nn.modules.linear.Linear"),
        lambda: nn.Linear(64, 32),
        noise(5, 64),
    ),
]

ROUNDS = {"int4": 2.0**-9, "int4-bytes": 2.0**-8, "int8": 2.0**-9}
"""Kernels that say that they round, and by how much: to bfloat16, or to 8 bits of each row."""


@parametrize_with_checks([*SCHEMES, *GRANULARITIES, PerToken()])
def test_grids_keep_the_laws(check: Check) -> None:
    check()


@parametrize_with_checks(
    [
        MinMax(),
        MovingAverage(0.3),
        Histogram(bins=64),
        Percentile(90.0),
        MSE(steps=5),
        Entropy(bins=300),
        Auto(),
        Hessian(),
        ColumnPeaks(),
    ]
)
def test_what_looks_at_values_keeps_the_laws(check: Check) -> None:
    check()


@parametrize_with_checks(
    [RoundToNearest(), HQQ(), GPTQ(), GPTQ(refinements=1), LearnedRounding(steps=8)]
)
def test_roundings_keep_the_laws(check: Check) -> None:
    check()


@parametrize_with_checks(LAYERS)
def test_layer_quantizers_keep_the_laws(check: Check) -> None:
    check()


@parametrize_with_checks(
    [
        ContainerCase(
            MultiheadAttentionContainer(),
            lambda: nn.MultiheadAttention(64, 4),
            (noise(7, 2, 64),) * 3,
        ),
        ContainerCase(
            TransformerEncoderContainer(),
            lambda: nn.TransformerEncoderLayer(64, 4, 64, batch_first=True),
            (noise(2, 7, 64),),
        ),
        ContainerCase(
            TransformerEncoderContainer(),
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(64, 4, 64, batch_first=True), 2
            ),
            (noise(2, 7, 64),),
        ),
    ]
)
def test_containers_keep_the_laws(check: Check) -> None:
    check()


@parametrize_with_checks([SafetensorsSerializer(), TorchSerializer()])
def test_formats_keep_the_laws(check: Check) -> None:
    check()


@parametrize_with_checks(
    [
        FoldBatchNorm(),
        EqualizeLayers(),
        AWQ(steps=3),
        SmoothQuant(steps=4),
        Rotate(),
        BiasCorrection(),
        TuneScales(steps=4),
    ]
)
def test_transforms_keep_the_laws(check: Check) -> None:
    check()


@parametrize_with_checks(
    [KernelCase(kernel, room=ROUNDS.get(kernel.name, 1e-4)) for kernel in KERNELS]
)
def test_kernels_keep_the_laws(check: Check) -> None:
    check()


@given(scheme=schemes(), x=stacks())
def test_whatever_is_drawn_keeps_the_laws(scheme: Scheme, x: Tensor) -> None:
    check_stack(scheme, x)


def test_every_built_in_kind_is_checked_here_or_with_its_container() -> None:
    """So that a new one is not forgotten: its laws run where its class is named."""
    elsewhere = {
        "bare",  # of no module: tests/layers/test_bare.py
        "multihead_attention_container",
        "transformer_encoder_layer",
        "transformer_encoder",
        "outlier_columns",
    }
    here = {one.kind for one in SCHEMES} | {one.quantizer.kind for one in LAYERS}
    known = {
        kind
        for kind, cls in registered().items()
        if cls.__module__.startswith("mono_quant.") and issubclass(cls, Scheme | LayerQuantizer)
    }
    assert known - here - elsewhere == set()
    assert {type(one) for one in VARIED}
