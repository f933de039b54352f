"""What is known of each weight: plain data, one row of a report."""

import math

import attrs

from mono_quant.configurable import Config
from mono_quant.speed import LayerSpeed

CRITICAL_DB = 10.0
WARNING_DB = 20.0
GOOD_DB = 30.0
_UNSEEN_DB = 15.0
"""By how much the smaller half of the values of a row has to be worse than all of them together.

For values that are spread normally it is 8 dB, for those of sound trained layers up to 14, whatever
the bits (`tests/benchmarks/advice.py` prints it).
"""


@attrs.frozen
class Distribution:
    """How values are spread over bins of one width, and what their grid covers.

    Attributes:
        start: the lower end of the first bin.
        width: of a bin.
        counts: how many values other than zero lie in each bin.
        zeros: how many are exactly zero.
        low: the smallest value.
        high: the largest.
        covered: the smallest and the largest value that the grid has, of all blocks with scales of
            their own; None where there is no one range.
        typical: the same of the median block; None where one range serves all.
    """

    start: float
    width: float
    counts: tuple[int, ...]
    zeros: int
    low: float
    high: float
    covered: tuple[float, float] | None = None
    typical: tuple[float, float] | None = None

    def to_dict(self) -> Config:
        """Return everything as JSON data."""
        return {
            **attrs.asdict(self),
            "counts": list(self.counts),
            "covered": list(self.covered) if self.covered is not None else None,
            "typical": list(self.typical) if self.typical is not None else None,
        }


@attrs.frozen
class InputReport:
    """What the inputs that one weight meets were like on the data, and how they use their grid.

    Attributes:
        name: dotted name of the weight.
        low: the smallest value.
        high: the largest.
        outliers: how many times the median channel the largest is, by root mean square or by
            maximum; None where channels are not known or too few.
        cut: share of the values that lie beyond a calibrated range; None for other ranges.
        cut_energy: squared error of cutting them off, as a share of all squares.
        uncut_gain_db: how much less error than that the whole range would leave, in dB; None where
            nothing is cut off.
        crowded: share of the values other than zero that fall on the two codes that are used most,
            of a calibrated range.
        per_token_gain_db: how much less error a range for each row would leave there, in dB, in the
            mean over rows; None where inputs are no rows, or have such ranges already.
        histogram: how the values are spread, of the few layers that return least.
    """

    name: str
    low: float
    high: float
    outliers: float | None = None
    cut: float | None = None
    cut_energy: float | None = None
    uncut_gain_db: float | None = None
    crowded: float | None = None
    per_token_gain_db: float | None = None
    histogram: Distribution | None = None

    def to_dict(self) -> Config:
        """Return everything as JSON data."""
        histogram = self.histogram.to_dict() if self.histogram is not None else None
        return {**attrs.asdict(self, recurse=False), "histogram": histogram}


@attrs.frozen
class LayerReport:
    """One weight, or the float parameters of one module.

    Attributes:
        name: dotted name of the weight or the module.
        layer: class of the layer.
        shape: native shape of a weight; empty for a module's parameters.
        parameters: how many values.
        float_bytes: bytes before.
        bytes: bytes after, scales and zero points counted.
        scheme: how it was quantized, or None for what stayed float.
        activation: how its inputs are quantized, or why they are not although they were to be.
        reason: why it stayed float, or was not quantized now.
        sqnr_db: of the weight, in dB; None where nothing was quantized.
        estimated_db: SQNR of a product with the weight, in dB, for inputs drawn so that every
            column counts alike, or all alike where its rows are too few to tell; of a weight that
            is only looked up, of its rows. An estimate without data, and without the error of
            quantized inputs; None where nothing was quantized.
        faint_db: the same for inputs drawn so that each row meets the smaller half of its values
            alone, and rows count alike: loud where weights are small, and faint where they are
            large. Of evenly spread rows; None where nothing was quantized, and where the weight is
            no matrix that inputs meet or has fewer than 16 rows.
        cast_db: the estimate that is low, once more with the weight at 16 bits, which is tried
            then; None where none is.
        outliers: root mean square of the largest column over that of the median one, or None.
        row_outliers: the same of the rows.
        columns: how many values a row of the weight's matrix has; 0 for a module's parameters.
        scale_block: the block of the weight as a stack ``[G, out, in]`` that shares one scale;
            empty where there are no scales.
        output_sqnr_db: of what its layer returns for the inputs that it has in the float model, in
            dB, weights and inputs quantized; None where that was not measured.
        accumulated_db: of what its layer returns inside the quantized model, where the errors of
            all layers before it arrive too, against the float model, in dB; where all layers return
            more than 4.2 million values for a batch, of some that are evenly spread. None where
            that was not measured.
        place: of its layer in the order in which the model first calls them, from 0 on; None where
            no data showed it.
        groups_gain_db: how much less error its layer would return with scales for groups, which its
            columns ask for, in dB; None where that was not tried.
        inputs: what its inputs were like on the data, where they are quantized; also those of tied
            weights.
        ranges: why observers chose the ranges that they did, of those that say so.
        note: what else is worth knowing.
        aliases: names of further weights that share these values, counted here once.
        has_matrix: whether a module's float parameters hold one of two dimensions or more.
        speed: of its layer, with all layers that share its values, as `only_if_faster` measured it;
            the rows of one layer share one.
        kernel: what computed with it when somebody looked; several where they differ.
        histogram: how the values of the weight are spread, of the few layers that return least.
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    parameters: int
    float_bytes: int
    bytes: int
    scheme: str | None = None
    activation: str | None = None
    reason: str | None = None
    sqnr_db: float | None = None
    estimated_db: float | None = None
    faint_db: float | None = None
    cast_db: float | None = None
    outliers: float | None = None
    row_outliers: float | None = None
    columns: int = 0
    scale_block: tuple[int, ...] = ()
    output_sqnr_db: float | None = None
    accumulated_db: float | None = None
    place: int | None = None
    groups_gain_db: float | None = None
    inputs: tuple[InputReport, ...] = ()
    ranges: tuple[str, ...] = ()
    note: str | None = None
    aliases: tuple[str, ...] = ()
    has_matrix: bool = False
    speed: LayerSpeed | None = None
    kernel: str | None = None
    histogram: Distribution | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits per value after, everything counted."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0

    @property
    def is_sound(self) -> bool:
        """Whether the layer was measured and returns what it should."""
        return self.output_sqnr_db is not None and self.output_sqnr_db >= GOOD_DB

    @property
    def harm_db(self) -> float:
        """What rows are sorted by, the worst first: what the layer returns, or else an estimate.

        Infinite where nothing is known; minus infinity for what is not finite.
        """
        known = (self.output_sqnr_db, self.drawn_db, self.sqnr_db)
        found = next((one for one in known if one is not None), math.inf)
        return -math.inf if math.isnan(found) else found

    @property
    def loses_faint(self) -> bool:
        """Whether inputs that are loud for small weights are lost, which `sqnr_db` does not see.

        That is so where some values of a row dwarf the others and few codes are left to those.
        """
        if self.faint_db is None or self.sqnr_db is None:
            return False
        return self.faint_db < min(WARNING_DB, self.sqnr_db - _UNSEEN_DB)

    @property
    def drawn_db(self) -> float | None:
        """What a product with the weight comes to for drawn inputs, in dB: the estimate to go by.

        For those that meet small weights alone, where they are lost.
        """
        return self.faint_db if self.loses_faint else self.estimated_db

    @property
    def is_doubtful(self) -> bool:
        """Whether little is left of what the layer returns, by the estimate."""
        return self.loses_faint or (
            self.estimated_db is not None and self.estimated_db < CRITICAL_DB
        )

    def with_inputs(
        self,
        activation: str | None,
        size: int,
        alias: str | None = None,
        *,
        reason: str | None = None,
    ) -> "LayerReport":
        """Return the row with what is said of the inputs, and the bytes that they take.

        Args:
            activation: how they are quantized, or why not; None for nothing to say.
            size: bytes of what was calibrated.
            alias: the tied weight that they meet, where it is not this one; it is only named where
                its inputs have another fate.
            reason: why their range is what it is.
        """
        of = f" of {alias}" if alias is not None else ""
        ranges = (*self.ranges, f"input range{of} by {reason}") if reason else self.ranges
        parts = self.activation
        if alias is None:
            parts = activation
        elif activation is not None and activation != self.activation:
            named = f"{activation} of {alias}"
            parts = named if self.activation is None else f"{self.activation}; {named}"
        return attrs.evolve(self, activation=parts, bytes=self.bytes + size, ranges=ranges)

    @property
    def fate(self) -> str:
        """The scheme, or why it stayed float; whose values these also are; ranges; the note."""
        parts = [self.scheme if self.scheme is not None else f"float: {self.reason}"]
        if self.scheme is None and self.speed is not None:
            parts[0] += f", quantized it is {self.speed.ratio:.2f} times as fast on the example"
        if self.activation is not None:
            parts.append(self.activation)
        if self.scheme is not None and self.reason:
            parts.append(self.reason)
        if self.aliases:
            parts.append(f"also {', '.join(self.aliases)}")
        parts += self.ranges
        if self.note:
            parts.append(self.note)
        return "; ".join(parts)

    def to_dict(self) -> Config:
        """Return everything as JSON data; an infinite SQNR is the string "inf"."""
        return {
            "name": self.name,
            "layer": self.layer,
            "shape": list(self.shape),
            "parameters": self.parameters,
            "float_bytes": self.float_bytes,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "scheme": self.scheme,
            "activation": self.activation,
            "reason": self.reason,
            "sqnr_db": finite(self.sqnr_db),
            "estimated_db": finite(self.estimated_db),
            "faint_db": finite(self.faint_db),
            "cast_db": finite(self.cast_db),
            "outliers": self.outliers,
            "row_outliers": self.row_outliers,
            "columns": self.columns,
            "scale_block": list(self.scale_block),
            "output_sqnr_db": finite(self.output_sqnr_db),
            "accumulated_db": finite(self.accumulated_db),
            "place": self.place,
            "groups_gain_db": finite(self.groups_gain_db),
            "inputs": [one.to_dict() for one in self.inputs],
            "ranges": list(self.ranges),
            "note": self.note,
            "aliases": list(self.aliases),
            "has_matrix": self.has_matrix,
            "speed": self.speed.to_dict() if self.speed is not None else None,
            "kernel": self.kernel,
            "histogram": self.histogram.to_dict() if self.histogram is not None else None,
        }


def grade(decibels: float) -> str:
    """Return the word for an SQNR: critical below 10 dB, warning below 20, good above 30."""
    if math.isnan(decibels) or decibels < CRITICAL_DB:
        return "critical"
    if decibels < WARNING_DB:
        return "warning"
    return "good" if decibels > GOOD_DB else "fair"


def finite(value: float | None) -> float | str | None:
    """Return a figure as JSON can hold it: what is not finite as text."""
    return value if value is None or math.isfinite(value) else str(value)
