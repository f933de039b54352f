"""What is done to a model before and after it is quantized: as asked, or as a quality chooses."""

from collections.abc import Iterable, Sequence

import attrs

from mono_quant.base import Change, Correction, Transform
from mono_quant.plan.request import Request, WeightPlan
from mono_quant.settings import QUALITIES, Quality
from mono_quant.text import format_bytes, joined

LARGEST_TUNED = 1 << 29
"""Bytes of quantized weights in float32, up to which a quality has the whole model corrected.

What learns from it holds several copies of them, and what training holds of a batch.
"""


@attrs.frozen(eq=False)
class Chosen:
    """What is done to the float model and to the quantized one, each in this order.

    Attributes:
        transforms: to the float model, but for folding.
        corrections: to the quantized one.
        foreseen: what a quality chose of these, or leaves out and why.
    """

    transforms: tuple[Transform, ...]
    corrections: tuple[Correction, ...]
    foreseen: tuple[Change, ...] = ()

    @classmethod
    def of(
        cls, request: Request, weights: Iterable[WeightPlan], *, in_place: bool = False
    ) -> "Chosen":
        """Return what was asked for; in place of nothing, and without a rounding, a quality's.

        Args:
            request: what was asked for.
            weights: their fates.
            in_place: whether the float model is not kept beside.
        """
        said, todo = request.settings, [one for one in weights if one.recipe is not None]
        quality = QUALITIES.get(said.quality or "", Quality())
        learned = {one.recipe.rounding for one in todo if one.recipe is not None}
        if said.rounding is not None or quality.rounding not in learned:
            quality = Quality()
        before = quality.transforms if request.calibrated and not request.transforms else ()
        after = quality.corrections if request.data is not None and not request.corrections else ()
        left_out = _refuse(todo, in_place=in_place) if after else None
        who, changes = f"quality {said.quality!r}", list[Change]()
        if before:
            text = f"{who}: the float model is changed first by {_names(before)}"
            changes.append(Change("", text))
        if left_out is not None:
            text = f"{who} leaves out {_names(after)}: {left_out}"
            changes.append(Change("", text, done=False))
            after = ()
        elif after:
            text = f"{who}: the quantized model is put right by {_names(after)}"
            changes.append(Change("", text))
        transforms, corrections = before or request.transforms, after or request.corrections
        return cls(transforms, corrections, tuple(changes))

    @property
    def refused(self) -> tuple[Change, ...]:
        """What a quality leaves out."""
        return tuple(change for change in self.foreseen if not change.done)


def _names(steps: Iterable[Transform | Correction]) -> str:
    return joined([repr(one) for one in steps])


def _refuse(todo: Sequence[WeightPlan], *, in_place: bool) -> str | None:
    """Return why a quantized model is not corrected unless that is asked for, or None."""
    if in_place:
        return "the float model, which it is held against, is not kept in place"
    size = 4 * sum(one.parameters for one in todo if one.tied_to is None)
    if size <= LARGEST_TUNED:
        return None
    found, largest = format_bytes(size), format_bytes(LARGEST_TUNED)
    return f"its weights are {found} in float32, and up to {largest} is worked on"
