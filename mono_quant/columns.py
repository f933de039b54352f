"""The columns of a report's table: how each is shown, and what it is sorted by."""

from collections.abc import Callable

import attrs

from mono_quant.evidence import LayerReport
from mono_quant.text import format_bytes, format_db

OUTPUT = "output"
ESTIMATED = (
    "~ estimated, not measured: of a product with the quantized weight alone, for inputs drawn so "
    "that all of its columns count alike, or, where that is far worse, so that rows meet the "
    "smaller half of their values alone; of an embedding, of its rows"
)
"""What the mark before an estimate means."""


@attrs.frozen
class Column:
    """One column.

    Attributes:
        title: above it.
        show: a row's cell as text; empty where there is nothing to tell.
        figure: what rows are sorted by, None where there is nothing; None for columns of text.
        meaning: of the title, in a sentence.
    """

    title: str
    show: Callable[[LayerReport], str]
    figure: Callable[[LayerReport], float | None] | None = None
    meaning: str = ""

    @property
    def numeric(self) -> bool:
        """Whether it holds figures, which stand to the right."""
        return self.figure is not None


def decibels(value: float | None) -> str:
    """Return an SQNR as text; nothing for None."""
    return format_db(value) if value is not None else ""


MEASURED = Column(
    OUTPUT,
    lambda row: decibels(row.output_sqnr_db),
    lambda row: row.output_sqnr_db,
    "SQNR of what the layer returns for the inputs that it has in the float model",
)
GUESSED = Column(
    OUTPUT,
    lambda row: f"~{format_db(row.drawn_db)}" if row.drawn_db is not None else "",
    lambda row: row.drawn_db,
    ESTIMATED,
)
ACCUMULATED = Column(
    "in model",
    lambda row: decibels(row.accumulated_db),
    lambda row: row.accumulated_db,
    "SQNR of what the layer returns inside the quantized model, all errors before it included",
)
"""Not in a terminal, where lines are long already."""


def columns_of(*, estimated: bool) -> tuple[Column, ...]:
    """Return the columns, with estimates of what layers return or what was measured of it."""
    return (
        Column("name", lambda row: row.name, meaning="dotted name of the weight or the module"),
        Column("layer", lambda row: row.layer, meaning="class of the layer"),
        Column("shape", lambda row: "x".join(map(str, row.shape)), meaning="of the weight"),
        Column(
            "before",
            lambda row: format_bytes(row.float_bytes),
            lambda row: row.float_bytes,
            "bytes before",
        ),
        Column(
            "after",
            lambda row: format_bytes(row.bytes),
            lambda row: row.bytes,
            "bytes after, scales and zero points counted",
        ),
        Column(
            "bits",
            lambda row: f"{row.bits_per_weight:.2f}",
            lambda row: row.bits_per_weight,
            "bits for each value, everything counted",
        ),
        Column(
            "SQNR",
            lambda row: decibels(row.sqnr_db),
            lambda row: row.sqnr_db,
            "signal to quantization noise ratio of the weight itself",
        ),
        GUESSED if estimated else MEASURED,
        Column(
            "speed",
            lambda row: f"{row.speed.ratio:.2f}x" if row.speed is not None else "",
            lambda row: row.speed.ratio if row.speed is not None else None,
            "time of the float layer by that of the quantized one",
        ),
        Column("kernel", lambda row: row.kernel or "", meaning="the code that computed with it"),
        Column("fate", lambda row: row.fate, meaning="how it is quantized, or why it is not"),
    )


def filled(
    columns: tuple[Column, ...], rows: tuple[LayerReport, ...]
) -> tuple[tuple[Column, ...], list[list[str]]]:
    """Return the columns in which some row has anything, and the rows' cells in them."""
    cells = [[column.show(row) for row in rows] for column in columns]
    shown = [place for place, texts in enumerate(cells) if any(texts) or not texts]
    lines = zip(*(cells[place] for place in shown), strict=True)
    return tuple(columns[place] for place in shown), [list(line) for line in lines]
