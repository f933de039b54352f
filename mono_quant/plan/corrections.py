"""What is done to a quantized model: what was asked for, or what a quality chooses."""

from collections.abc import Iterable

import attrs

from mono_quant.base import Change, Correction
from mono_quant.plan.request import Request, WeightPlan
from mono_quant.settings import QUALITIES, Quality
from mono_quant.text import format_bytes, joined

LARGEST_TUNED = 1 << 29
"""Bytes of quantized weights in float32, up to which a quality has the whole model corrected.

What learns from it holds several copies of them, and what training holds of a batch.
"""


@attrs.frozen(eq=False)
class Corrections:
    """What is done to a quantized model, in this order.

    Attributes:
        steps: what is done.
        quality: the name of the quality that chose them, or None.
        left_out: why what it would choose is left out, or None.
    """

    steps: tuple[Correction, ...] = ()
    quality: str | None = None
    left_out: str | None = None

    @classmethod
    def of(
        cls, request: Request, weights: Iterable[WeightPlan], *, in_place: bool = False
    ) -> "Corrections":
        """Return what was asked for; where that is nothing, and no rounding, what a quality has."""
        said, todo = request.settings, [one for one in weights if one.recipe is not None]
        chosen = QUALITIES.get(said.quality or "", Quality())
        is_free = not request.corrections and said.rounding is None and request.data is not None
        learned = {one.recipe.rounding for one in todo if one.recipe is not None}
        if not is_free or not chosen.corrections or chosen.rounding not in learned:
            return cls(request.corrections)
        size = 4 * sum(one.parameters for one in todo if one.tied_to is None)
        reason = None
        if in_place:
            reason = "the float model, which they are held against, is not kept in place"
        elif size > LARGEST_TUNED:
            sizes = (format_bytes(size), format_bytes(LARGEST_TUNED))
            reason = "its weights are {} in float32, and up to {} is worked on".format(*sizes)
        return cls(chosen.corrections if reason is None else (), said.quality, reason)

    def foreseen(self) -> tuple[Change, ...]:
        """Return what a quality chose, or leaves out."""
        if self.quality is None:
            return ()
        chosen = joined([repr(one) for one in QUALITIES[self.quality].corrections])
        if self.left_out is None:
            text = f"quality {self.quality!r}: the quantized model is put right by {chosen}"
        else:
            text = f"quality {self.quality!r} leaves out {chosen}: {self.left_out}"
        return (Change("", text, done=self.left_out is None),)
