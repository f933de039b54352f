"""Accuracy, size and reloading of MiniLM with the 36 Linears of its blocks quantized, without data.

The expected figures come from an independent implementation, written from the papers and measured
on the same weights and texts; differences of its output SQNR below 0.1 dB are rounding and noise.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from mono_quant import (
    HQQ,
    MSE,
    Codebook,
    FittedCodebook,
    Float8,
    Microscaling,
    PerGroup,
    Quantizer,
    Scheme,
)
from mono_quant.demo import lee_documents, pearson_with_humans
from tests.benchmarks.measure import MB, print_table
from tests.benchmarks.minilm import (
    Figures,
    figures_of,
    filed,
    in_blocks,
    original,
    payload,
    reference,
)


class Setting(NamedTuple):
    """One way to quantize, and what it is expected to come to.

    Attributes:
        title: in the table.
        bits: of a code.
        group: values that share a scale; None for a row.
        symmetric: no zero points.
        search: find each range by the MSE observer.
        hqq: move zero points by `HQQ`.
        float_zero_point: zero points are floats.
        expected: the independent figures; None where there are none.
        scheme: of these bits and groups, where it is no affine grid.
        scale_bits: of a scale.
        beside: bytes beside codes, scales and zero points, of each weight.
    """

    title: str
    bits: int
    group: int | None = None
    symmetric: bool = False
    search: bool = False
    hqq: bool = False
    float_zero_point: bool = False
    expected: Figures | None = None
    scheme: Scheme | None = None
    scale_bits: int = 16
    beside: int = 0

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer that was meant."""
        quantizer = Quantizer().activations(None)  # the table is of weights alone
        if self.scheme is not None:
            quantizer = quantizer.scheme(self.scheme)
        else:
            quantizer = quantizer.bits(self.bits)
            if self.bits != 16:
                quantizer = quantizer.symmetric(self.symmetric)
            if self.group is not None:
                quantizer = quantizer.group_size(self.group)
        if self.float_zero_point:
            quantizer = quantizer.float_zero_point()
        if self.hqq:
            quantizer = quantizer.rounding(HQQ())
        return quantizer.observer(MSE()) if self.search else quantizer

    @property
    def _zero_bits(self) -> int:
        if self.symmetric:
            return 0
        return self.scale_bits if self.float_zero_point else self.bits

    @property
    def payload(self) -> float:
        """The bytes that shapes say."""
        if self.bits == 16:
            return payload(16, self.group, 0)
        return payload(
            self.bits,
            self.group,
            self.scale_bits + self._zero_bits,
            self.beside,
        )


INT4 = (
    Setting("INT4 g32", 4, 32, expected=Figures(4.625, 21.62, 12.34, 0.6515)),
    Setting("INT4 g64", 4, 64, expected=Figures(4.3125, 20.45, 11.21, 0.6461)),
    Setting("INT4 g128", 4, 128, expected=Figures(4.15625, 19.43, 10.00, 0.6588)),
)
SEARCHED = (
    Setting("INT4 g32, MSE", 4, 32, search=True, expected=Figures(4.625, 21.92, 12.61, 0.6613)),
    Setting("INT4 g64, MSE", 4, 64, search=True, expected=Figures(4.3125, 20.81, 11.75, 0.6553)),
    Setting("INT4 g128, MSE", 4, 128, search=True, expected=Figures(4.15625, 19.92, 10.78, 0.6515)),
)
# of float zero points: what the hqq package printed on the same weights and texts
HQQ_PACKAGE = {
    32: Figures(5.0, 22.39, 12.45, 0.6604),
    64: Figures(4.5, 20.94, 10.99, 0.6727),
    128: Figures(4.25, 19.75, 9.97, 0.6471),
}
HALF_QUADRATIC = (
    *(
        Setting(f"INT4 g{group}, HQQ, float zero points", 4, group, False, False, True, True, known)
        for group, known in HQQ_PACKAGE.items()
    ),
    *(
        Setting(f"INT4 g{group}, MSE, HQQ, float zero points", 4, group, False, True, True, True)
        for group in HQQ_PACKAGE
    ),
    *(Setting(f"INT4 g{group}, HQQ", 4, group, hqq=True) for group in HQQ_PACKAGE),
)
OTHERS = (
    Setting("INT3 g64", 3, 64, expected=Figures(3.296875, 13.84, 5.16, 0.6537)),
    Setting("INT2 g64", 2, 64, expected=Figures(2.28125, 6.54, -1.16, 0.4238)),
    Setting("INT8 per channel, symmetric", 8, symmetric=True),
    Setting("INT8 per channel, asymmetric", 8),
    Setting("FP16", 16, symmetric=True),
)
SETTINGS = (*INT4, *SEARCHED, *HALF_QUADRATIC, *OTHERS)
_E4M3 = torch.float8_e4m3fn
_GLOBAL = 4  # bytes of a global scale


def _nf4(group: int, scales: torch.dtype, search: bool, known: Figures | None = None) -> Setting:
    scale_bits, beside = 8 * scales.itemsize, _GLOBAL if scales is _E4M3 else 0
    scheme = Codebook.nf4(PerGroup(group), scales)
    title = f"NF4 g{group}, {_scales(scales)}{', MSE' if search else ''}"
    return Setting(
        title,
        4,
        group,
        True,
        search,
        expected=known,
        scheme=scheme,
        scale_bits=scale_bits,
        beside=beside,
    )


def _fitted(bits: int, group: int, scales: torch.dtype, search: bool = True) -> Setting:
    beside = 2 * 2**bits + (_GLOBAL if scales is _E4M3 else 0)
    scheme = FittedCodebook(bits, PerGroup(group), scales)
    title = f"fitted {bits}-bit g{group}, {_scales(scales)}{', MSE' if search else ''}"
    return Setting(
        title,
        bits,
        group,
        True,
        search,
        scheme=scheme,
        scale_bits=8 * scales.itemsize,
        beside=beside,
    )


def _scales(dtype: torch.dtype) -> str:
    names = {_E4M3: "e4m3", torch.float16: "fp16", torch.float32: "fp32"}
    return f"{names[dtype]} scales"


def _block(scheme: Microscaling, search: bool) -> Setting:
    title = f"{scheme.describe()}{', MSE' if search else ''}"
    beside = _GLOBAL if scheme.scale == "e4m3" else 0
    group = scheme.granularity.size
    return Setting(
        title, scheme.code_bits, group, True, search, scheme=scheme, scale_bits=8, beside=beside
    )


NF4 = (  # in brackets bitsandbytes, whose scales are float32
    _nf4(32, torch.float32, False, Figures(5.0, 21.11, 12.74, 0.6510)),
    _nf4(64, torch.float32, False, Figures(4.5, 20.56, 12.01, 0.6518)),
    _nf4(128, torch.float32, False, Figures(4.25, 20.08, 11.23, 0.6339)),
)
CODEBOOKS = (
    *NF4,
    *(_nf4(group, torch.float16, True) for group in (32, 64, 128)),
    *(_nf4(group, _E4M3, True) for group in (8, 16, 32)),
    _fitted(4, 32, torch.float16, False),
    *(_fitted(4, group, torch.float16) for group in (32, 64, 128)),
    *(_fitted(4, group, _E4M3) for group in (8, 16, 32)),
    _fitted(3, 64, torch.float16),
    *(_fitted(3, group, _E4M3) for group in (16, 32)),
    _fitted(2, 64, torch.float16),
    *(_fitted(2, group, _E4M3) for group in (16, 32)),
)
"""Lookup tables, with ever finer groups."""

FLOATS = (
    *(_block(Microscaling.mxfp4(), search) for search in (False, True)),
    *(_block(Microscaling.nvfp4(), search) for search in (False, True)),
    _block(Microscaling.mxfp6("e2m3"), False),
    _block(Microscaling.mxfp8("e4m3"), False),
    Setting("FP8 e4m3 per channel", 8, None, True, scheme=Float8(), scale_bits=32),
    Setting("FP8 e5m2 per channel", 8, None, True, scheme=Float8(torch.float8_e5m2), scale_bits=32),
)
"""Floats of few bits."""

FILED = (*SETTINGS, NF4[1], _fitted(4, 16, _E4M3), *FLOATS)
"""Whose files are written and read again."""

BUDGETS = (5.0, 4.5, 4.25, 3.5, 3.25, 2.5, 2.25)
"""Bits per weight; a table of levels and a global scale take less than `_SMALL` beside."""

_SMALL = 0.005


def measured(setting: Setting) -> Figures:
    """Return the figures of a setting."""
    return figures_of(in_blocks(setting.quantizer).apply(original()))


def main() -> None:
    """Print accuracy, the best for so many bits, then files."""
    reference()
    print("In brackets: the independent implementation, and for NF4 bitsandbytes. SQNR in dB.\n")
    found: dict[Setting, Figures] = {}
    columns = ("weights", "bits/weight", "weight SQNR", "output SQNR", "Lee Pearson")
    print_table(columns, _accuracy(found))
    print("The best of these without data for so many bits per weight:\n")
    print_table(("at most", *columns), _best(found))
    columns = ("weights", "file MB", "payload MB", "file/payload", "fresh process, to the bit")
    print_table(columns, map(_file, FILED))


def _accuracy(found: dict[Setting, Figures]) -> Iterator[tuple[str, ...]]:
    """Yield a row for float and for each setting, and add the setting's figures to those found."""
    documents = reference()[: len(lee_documents())]
    yield ("float32", "32", "", "", f"{pearson_with_humans(documents):.4f}")
    for setting in (*SETTINGS, *CODEBOOKS, *FLOATS):
        found[setting] = measured(setting)
        yield (setting.title, *_cells(found[setting], setting.expected))


def _cells(found: Figures, known: Figures | None = None) -> list[str]:
    cells = []
    for place, digits in enumerate((4, 2, 2, 4)):
        beside = f" ({known[place]:.{digits}f})" if known else ""
        cells.append(f"{found[place]:.{digits}f}{beside}")
    return cells


def _best(found: dict[Setting, Figures]) -> Iterator[tuple[str, ...]]:
    for budget in BUDGETS:
        within = [one for one, it in found.items() if it.bits_per_weight <= budget + _SMALL]
        best = max(within, key=lambda setting: found[setting].output_sqnr)
        yield (f"{budget}", best.title, *_cells(found[best]))


def _file(setting: Setting) -> tuple[str, ...]:
    file, expected = filed(in_blocks(setting.quantizer).apply(original())), setting.payload
    return (
        setting.title,
        f"{file.bytes / MB:.3f}",
        f"{expected / MB:.3f}",
        f"{file.bytes / expected:.4f}",
        "equal" if file.equal else "DIFFERENT",
    )
