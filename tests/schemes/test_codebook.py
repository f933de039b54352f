"""Tables: the published one, and fits that gain."""

from collections.abc import Sequence
from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor

from mono_quant import (
    MSE,
    Affine,
    Codebook,
    ConfigurationError,
    FittedCodebook,
    MinMax,
    PackedTensor,
    PerChannel,
    PerGroup,
    PerTensor,
    QParams,
    QTensor,
    Quantizer,
    Scheme,
    sqnr_db,
)
from mono_quant.configurable import Json
from mono_quant.numerics.values import Layout
from mono_quant.schemes.codebook import NF4
from tests.helpers import noise, same_bits

_E4M3 = torch.float8_e4m3fn


def test_nf4_is_what_its_definition_comes_to() -> None:
    """Quantiles of the normal distribution, each sign its own, scaled to end at 1.

    Source: Dettmers et al., arXiv 2305.14314, section 3, with the offset of its authors' program:
    evenly spaced probabilities, eight above zero and seven below.
    """
    offset = 0.9677083

    def upper(count: int) -> Tensor:
        chances = torch.linspace(offset, 0.5, count + 1, dtype=torch.float64)[:-1]
        quantiles: Tensor = torch.special.ndtri(chances)
        return quantiles

    points = torch.cat([upper(8), torch.zeros(1, dtype=torch.float64), -upper(7)])
    points = points.sort().values
    expected = points / points.max()
    found = torch.tensor(NF4, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-7)
    assert (float(found[0]), float(found[7]), float(found[15])) == (-1.0, 0.0, 1.0)


def test_codes_are_places_and_a_scale_is_the_largest_magnitude() -> None:
    scheme = Codebook.nf4(PerTensor())
    x = -2.0 * torch.tensor(NF4).reshape(1, 1, 16)
    qparams = scheme.choose_qparams(x, MinMax())
    assert qparams.scale is not None
    assert qparams.scale.dtype == torch.float16
    assert qparams.scale.tolist() == [[[2.0]]]
    assert scheme.quantize(2.0 * torch.tensor(NF4).reshape(1, 1, 16), qparams).codes.tolist() == [
        [list(range(16))]
    ]


@pytest.mark.parametrize(("group", "bits"), [(32, 4.5), (64, 4.25), (128, 4.125)])
def test_nf4_takes_what_its_groups_add(group: int, bits: float) -> None:
    assert Codebook.nf4(PerGroup(group)).bits_per_weight((1, 384, 384)) == bits
    wide = Codebook.nf4(PerGroup(group), torch.float32)
    assert wide.bits_per_weight((1, 384, 384)) == 4 + 32 / group
    narrow = Codebook.nf4(PerGroup(group), _E4M3)
    assert narrow.bits_per_weight((1, 384, 384)) == 4 + 8 / group + 32 / 384**2


def test_a_fitted_table_is_counted() -> None:
    for bits in range(2, 9):
        scheme = FittedCodebook(bits, PerGroup(64))
        assert scheme.bits_per_weight((1, 256, 256)) == bits + 16 / 64 + 16 * 2**bits / 256**2


def test_a_table_of_ones_own_is_taken() -> None:
    levels = (-1.0, -0.25, 0.25, 1.0)
    scheme = Codebook(levels, PerChannel())
    assert scheme.code_bits == 2
    x = torch.tensor([[[4.0, -1.2, 0.9, -3.9], [0.0, 0.0, 0.0, 0.0]]])
    found = scheme.fake_quantize(x, scheme.choose_qparams(x, MinMax()))
    assert found.tolist() == [[[4.0, -1.0, 1.0, -4.0], [0.0, 0.0, 0.0, 0.0]]]
    assert Scheme.from_config(scheme.to_config()) == scheme
    assert Codebook(list(levels), PerChannel()) == scheme
    assert scheme.describe() == "2-bit codebook per-channel"


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ("nf5", "there is no table 'nf5', only 'nf4'"),
        ((), "not 0"),
        ((0.0, 1.0), "not 2"),
        ((-1.0, 0.0, 1.0), "not 3"),
        ((-1.0, 0.0, 0.0, 1.0), "ascend"),
        ((-1.0, 0.5, 0.0, 1.0), "ascend"),
        ((-2.0, -1.0, 1.0, 2.0), "divide them by the largest"),
        ((-1.0, 0.0, float("nan"), 1.0), "ascend"),
    ],
)
def test_what_is_no_table_is_refused(levels: str | Sequence[float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Codebook(levels)


@pytest.mark.parametrize("bits", [1, 9, 4.0, True, "4", None])
def test_a_fitted_table_has_two_to_eight_bits(bits: Json) -> None:
    with pytest.raises(ConfigurationError, match="2 to 8 bits"):
        Scheme.from_config({"kind": "fitted_codebook", "bits": bits})


@pytest.mark.parametrize("kind", ["codebook", "fitted_codebook"])
def test_scales_and_granularities_are_checked(kind: str) -> None:
    with pytest.raises(ConfigurationError, match="not float64"):
        Scheme.from_config({"kind": kind, "scale_dtype": "float64"})
    with pytest.raises(ConfigurationError, match="granularity is a Granularity"):
        Scheme.from_config({"kind": kind, "granularity": 32})


def weights(seed: int) -> Tensor:
    return noise(1, 64, 256, seed=seed) * 0.05


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("observer", [MinMax(), MSE()], ids=repr)
def test_a_fitted_table_beats_even_levels(bits: int, observer: MinMax | MSE) -> None:
    x, group = weights(bits), PerGroup(64)
    even, fit = Affine(bits, False, group), FittedCodebook(bits, group)
    found = [
        sqnr_db(x, one.fake_quantize(x, one.choose_qparams(x, observer))) for one in (even, fit)
    ]
    assert found[1] > found[0] + 0.15


def test_a_fitted_table_beats_nf4_on_normal_weights() -> None:
    x, group = weights(1), PerGroup(64)
    nf4, fit = Codebook.nf4(group), FittedCodebook(4, group)
    for observer in (MinMax(), MSE()):
        found = [
            sqnr_db(x, one.fake_quantize(x, one.choose_qparams(x, observer))) for one in (nf4, fit)
        ]
        assert found[1] > found[0] + 0.3


def test_a_fitted_table_follows_the_weight() -> None:
    """Of few sizes, most are met exactly, up to half precision."""
    sizes = torch.tensor([-0.5, 0.0, 0.2, 1.0])
    x = sizes[torch.randint(0, 4, (1, 32, 64), generator=torch.Generator().manual_seed(0))]
    scheme = FittedCodebook(3, PerTensor(), torch.float32)
    found = scheme.fake_quantize(x, scheme.choose_qparams(x, MinMax()))
    torch.testing.assert_close(found, x, rtol=1e-3, atol=0)


def test_the_largest_value_lies_at_one_whatever_its_sign() -> None:
    scheme = FittedCodebook(4, PerGroup(4))
    x = torch.tensor([[[0.5, -2.0, 1.0, 0.0, 0.5, 2.0, 1.0, 0.0]]])
    qparams = scheme.choose_qparams(x, MinMax())
    assert qparams.scale is not None
    assert qparams.scale.flatten().tolist() == [-2.0, 2.0]


def test_the_fit_is_the_same_each_time_and_changes_nothing() -> None:
    x = weights(3)
    before = x.clone()
    one, other = (FittedCodebook(4).choose_qparams(x, MSE()) for _ in range(2))
    assert same_bits(one.extra["levels"], other.extra["levels"])
    assert same_bits(x, before)
    assert one.extra["levels"].dtype == torch.float16
    assert 0.0 in one.extra["levels"].tolist()


def test_a_large_tensor_with_one_scale_is_fitted_to_some_of_its_values() -> None:
    x = noise(1, 600, 512)
    x[0, 5, 7] = 40.0  # an outlier that a sample would have missed
    scheme = FittedCodebook(4, PerTensor())
    qparams = scheme.choose_qparams(x, MinMax())
    assert qparams.scale is not None
    assert float(qparams.scale) == 40.0
    assert sqnr_db(x, scheme.fake_quantize(x, qparams)) > 16


def test_a_scale_that_half_precision_cannot_hold_is_float32_and_said_so() -> None:
    x = weights(0)
    x[0, 3] *= 1e-7
    scheme = Codebook.nf4()
    q = scheme.quantize(x, scheme.choose_qparams(x, MinMax()))
    assert q.qparams.scale is not None
    assert q.qparams.scale.dtype == torch.float32
    assert "its scales are float32, since float16 cannot hold them" in str(scheme.remark(q))
    packed = PackedTensor.pack(q, scheme, Layout.grouped((64, 256)), torch.float32)
    assert packed.nbytes == scheme.nbytes((1, 64, 256)) + 2 * 64 * 4
    assert scheme.refuse_parts(packed.tensors, (1, 64, 256)) is None


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Codebook.nf4(), "NF4 per-group 64"),
        (Codebook.nf4(PerGroup(32), _E4M3), "NF4 per-group 32, float8_e4m3fn scales"),
        (FittedCodebook(3, PerChannel()), "3-bit fitted codebook per-channel"),
    ],
    ids=str,
)
def test_they_describe_themselves(scheme: Scheme, words: str) -> None:
    assert scheme.describe() == words
    quantizer = Quantizer().scheme(scheme)
    written: object = eval(repr(quantizer), {**vars(torch), **globals(), "torch": torch})
    assert repr(written) == repr(quantizer)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("tail", [1, 3])
def test_a_search_by_levels_nearby_finds_what_the_exact_one_does(
    monkeypatch: pytest.MonkeyPatch, bits: int, tail: int
) -> None:
    x = noise(1, 64, 512) ** tail
    scheme = FittedCodebook(bits)

    def missed() -> float:
        return sqnr_db(x, scheme.fake_quantize(x, scheme.choose_qparams(x, MSE())))

    found = missed()
    monkeypatch.setattr(FittedCodebook, "approximate", Scheme.approximate)
    exact = missed()
    assert found == pytest.approx(exact, abs=0.02), "dB"


@attrs.frozen
class Even(FittedCodebook):
    """A table of every other level: its own way to quantize is what counts."""

    kind: ClassVar[str] = "tests.even_levels"

    def quantize(self, x: Tensor, qparams: QParams) -> QTensor:
        q = super().quantize(x, qparams)
        return QTensor(q.codes // 2 * 2, qparams, q.dtype)


def test_a_table_with_a_quantize_of_its_own_is_searched_by_it() -> None:
    x, scheme = noise(1, 64, 512), Even(4)
    qparams = scheme.choose_qparams(x, MinMax())
    assert same_bits(scheme.approximate(x, qparams), scheme.fake_quantize(x, qparams))
    assert not torch.equal(
        scheme.approximate(x, qparams), FittedCodebook(4).approximate(x, qparams)
    )
