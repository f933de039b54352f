"""What was asked for, and what one weight's fate is."""

from collections.abc import Iterable

import attrs

from mono_quant.base import Container, Correction, LayerQuantizer, Transform
from mono_quant.calibration import CalibrationData
from mono_quant.numerics.values import Layout
from mono_quant.selection import Selector
from mono_quant.settings import Recipe, Settings
from mono_quant.speed import LayerSpeed
from mono_quant.statistics import CalibrationStatistics

LOW_BITS = 8
"""Widths below this are low: small layers and embeddings stay float by default."""

ACTIONS = ("warn", "keep", "error")
"""What may happen where quantizing destroys a layer."""


@attrs.frozen(eq=False)
class OnlyIfFaster:
    """That layers stay float which are no faster quantized.

    Attributes:
        example: what the model is called with to see it.
        margin: by which share more a layer must be faster.
    """

    example: CalibrationData
    margin: float


@attrs.frozen(eq=False)
class Request:
    """All that a quantizer was told.

    Attributes:
        settings: for all layers.
        overrides: settings for some, later ones over earlier ones.
        only: if not empty, nothing but these layers.
        skip: not these layers.
        layers: further kinds of layer, asked before the built-in ones.
        containers: further kinds of container.
        transforms: what is done to the working copy first, in this order.
        corrections: what is done to the quantized model, in this order.
        fold: whether batch normalizations are folded first; None: where inputs are quantized.
        on_damage: "warn" of destroyed layers, "keep" what does the damage at 16 bits or its inputs
            in float, or take it for an "error".
        data: batches to calibrate on, and to measure on where there are no others for that.
        measured: batches to measure on, where those are others.
        statistics: what calibration gathered before, in place of a pass over the data.
        faster: what keeps layers float that gain no speed; None: all are quantized.
    """

    settings: Settings = attrs.field(factory=Settings)
    overrides: tuple[tuple[Selector, Settings], ...] = ()
    only: tuple[Selector, ...] = ()
    skip: tuple[Selector, ...] = ()
    layers: tuple[LayerQuantizer, ...] = ()
    containers: tuple[Container, ...] = ()
    transforms: tuple[Transform, ...] = ()
    corrections: tuple[Correction, ...] = ()
    fold: bool | None = None
    on_damage: str = "warn"
    data: CalibrationData | None = None
    measured: CalibrationData | None = None
    statistics: CalibrationStatistics | None = None
    faster: OnlyIfFaster | None = None

    @property
    def evidence(self) -> CalibrationData | None:
        """What the result is measured on; None for nothing."""
        return self.measured.called_as(self.data) if self.measured is not None else self.data

    @property
    def apart(self) -> bool:
        """Whether it is measured on other data than it is calibrated on."""
        return self.measured is not None and self.calibrated

    def held(self) -> "Request":
        """Return this with its batches held in memory, so that every pass sees the same ones."""
        data = self.data.held() if self.data is not None else None
        measured = self.measured.called_as(data).held() if self.measured is not None else None
        return attrs.evolve(self, data=data, measured=measured)

    @property
    def calibrated(self) -> bool:
        """Whether something is known of the inputs of layers."""
        return self.data is not None or self.statistics is not None


@attrs.frozen(eq=False)
class WeightPlan:
    """One weight's fate.

    Attributes:
        path: name of its layer; the first of several.
        name: the weight's name in the layer.
        layer: the layer's class.
        maker: knows the layer.
        layout: the weight as a stack.
        settings: what was asked for it.
        sources: names of the float parameters that it is made of.
        parameters: how many values.
        float_bytes: bytes now.
        asked: whether the user named this layer.
        reason: why it stays float, or None.
        by_default: whether that is a default, which the user's word on a tied weight would lift.
        recipe: how it is quantized, if it is.
        kept: why it is kept at 16 bits, or its inputs in float, or None.
        float_inputs: why its inputs stay float although they were to be quantized, or None.
        tied_to: the weight that it shares its values with, if that comes first.
        aliases: names of the later weights that share its values.
        speed: of its layer with those that share its values, if it was measured.
        kernel: what computed with it then.
    """

    path: str
    name: str
    layer: str
    maker: LayerQuantizer
    layout: Layout
    settings: Settings
    sources: tuple[str, ...]
    parameters: int
    float_bytes: int
    asked: bool = False
    reason: str | None = None
    by_default: bool = False
    recipe: Recipe | None = None
    kept: str | None = None
    float_inputs: str | None = None
    tied_to: "WeightPlan | None" = None
    aliases: tuple[str, ...] = ()
    speed: LayerSpeed | None = None
    kernel: str | None = None

    @property
    def key(self) -> str:
        """The weight's dotted name."""
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def nbytes(self) -> int:
        """Predicted bytes: nothing for a weight that shares another's."""
        if self.tied_to is not None:
            return 0
        if self.recipe is None or self.reason is not None:
            return self.float_bytes
        return self.recipe.grid.scheme.nbytes(self.layout.stack) + self.input_bytes

    @property
    def input_bytes(self) -> int:
        """Predicted bytes of what is calibrated for its inputs, which a tied weight has too."""
        if self.recipe is None or self.recipe.activations.mode != "static":
            return 0
        return 4 if self.recipe.activations.symmetric else 5  # a scale and a zero point


def by_layer(weights: Iterable[WeightPlan]) -> dict[str, list[WeightPlan]]:
    """Return weights by the names of their layers, in the order in which they come."""
    found: dict[str, list[WeightPlan]] = {}
    for weight in weights:
        found.setdefault(weight.path, []).append(weight)
    return found
