"""Accuracy, size and reloading of MiniLM with the 36 Linears of its blocks quantized.

The expected figures come from an independent implementation, written from the papers and measured
on the same weights and texts; differences of its output SQNR below 0.1 dB are rounding and noise.
"""

from collections.abc import Iterator
from typing import NamedTuple

from mono_quant import HQQ, MSE, Quantizer
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
    """

    title: str
    bits: int
    group: int | None = None
    symmetric: bool = False
    search: bool = False
    hqq: bool = False
    float_zero_point: bool = False
    expected: Figures | None = None

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer that was meant."""
        quantizer = Quantizer().bits(self.bits).activations(None)  # the table is of weights alone
        if self.bits != 16:
            quantizer = quantizer.symmetric(self.symmetric)
        if self.group is not None:
            quantizer = quantizer.group_size(self.group)
        if self.float_zero_point:
            quantizer = quantizer.float_zero_point()
        if self.hqq:
            quantizer = quantizer.rounding(HQQ())
        return quantizer.observer(MSE()) if self.search else quantizer


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
FLOATS = {
    32: Figures(5.0, 22.39, 12.45, 0.6604),
    64: Figures(4.5, 20.94, 10.99, 0.6727),
    128: Figures(4.25, 19.75, 9.97, 0.6471),
}
HALF_QUADRATIC = (
    *(
        Setting(f"INT4 g{group}, HQQ, float zero points", 4, group, False, False, True, True, known)
        for group, known in FLOATS.items()
    ),
    *(
        Setting(f"INT4 g{group}, MSE, HQQ, float zero points", 4, group, False, True, True, True)
        for group in FLOATS
    ),
    *(Setting(f"INT4 g{group}, HQQ", 4, group, hqq=True) for group in FLOATS),
)
OTHERS = (
    Setting("INT3 g64", 3, 64, expected=Figures(3.296875, 13.84, 5.16, 0.6537)),
    Setting("INT2 g64", 2, 64, expected=Figures(2.28125, 6.54, -1.16, 0.4238)),
    Setting("INT8 per channel, symmetric", 8, symmetric=True),
    Setting("INT8 per channel, asymmetric", 8),
    Setting("FP16", 16, symmetric=True),
)
SETTINGS = (*INT4, *SEARCHED, *HALF_QUADRATIC, *OTHERS)


def measured(setting: Setting) -> Figures:
    """Return the figures of a setting."""
    return figures_of(in_blocks(setting.quantizer).apply(original()))


def main() -> None:
    """Print accuracy, then files."""
    reference()
    print("In brackets: the independent implementation. SQNR in dB.\n")
    files: list[tuple[str, ...]] = []
    columns = ("weights", "bits/weight", "weight SQNR", "output SQNR", "Lee Pearson")
    print_table(columns, _accuracy(files))
    columns = ("weights", "file MB", "payload MB", "file/payload", "fresh process, to the bit")
    print_table(columns, files)


def _accuracy(files: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Yield a row for float and for each setting, and add one on a setting's file."""
    documents = reference()[: len(lee_documents())]
    yield ("float32", "32", "", "", f"{pearson_with_humans(documents):.4f}")
    for setting in SETTINGS:
        result = in_blocks(setting.quantizer).apply(original())
        found, known = figures_of(result), setting.expected
        cells = []
        for place, digits in enumerate((4, 2, 2, 4)):
            beside = f" ({known[place]:.{digits}f})" if known else ""
            cells.append(f"{found[place]:.{digits}f}{beside}")
        yield (setting.title, *cells)
        parts = (setting.bits, setting.group, setting.symmetric, setting.float_zero_point)
        file, expected = filed(result), payload(*parts)
        files.append(
            (
                setting.title,
                f"{file.bytes / MB:.3f}",
                f"{expected / MB:.3f}",
                f"{file.bytes / expected:.4f}",
                "equal" if file.equal else "DIFFERENT",
            )
        )
