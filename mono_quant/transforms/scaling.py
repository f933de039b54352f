"""Channels scaled between a norm or layer and the layers behind it, as the data asks for it."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import WITHOUT_DATA, Change, Transform, TransformContext
from mono_quant.errors import ConfigurationError
from mono_quant.progress import shown
from mono_quant.text import joined
from mono_quant.transforms.groups import WATCHED, Group, find_groups, weight_of
from mono_quant.transforms.objective import Consumer, Objective
from mono_quant.transforms.rescaling import Undo, matrices
from mono_quant.transforms.samples import inputs_of
from mono_quant.transforms.watching import agree, outputs_of


class InputScaling(Transform):
    """Divides what layers are given by a scale per channel, and multiplies their columns by it.

    What subclasses share. A norm or layer whose output alone reaches some layers, through nothing
    but steps that pass a factor on, is divided by it, so that the model computes the same; see
    `find_groups` for how that is made sure of. Of the scales that a subclass proposes, the one is
    taken that leaves the least error in what the layers return, with their weights rounded to the
    nearest point of their grids and their inputs too, where those will be quantized: on a sample of
    the inputs that the data gives them, the noise over the signal of each layer, on average. Where
    none leaves less than no scaling does, nothing is changed. Computed in float64, rounded once.
    """

    __slots__ = ()
    needs_data: ClassVar[bool] = True

    @abstractmethod
    def scales(self, group: Group, consumers: Sequence[Consumer]) -> Mapping[float, Tensor]:
        """Return scales of a source's channels, ``float64 [width]``, by the exponent they have."""

    def refuse(self, consumers: Sequence[Consumer]) -> str | None:
        """Return why layers should not be scaled by this, or None."""
        return None

    def apply(
        self, model: nn.Module, context: TransformContext = WITHOUT_DATA
    ) -> tuple[Change, ...]:
        """Scale what can be, in place; return a change for each group, done or refused.

        Only layers that are going to be quantized are looked at, by the context's targets.
        """
        if context.outputs is None:
            why = "without example data nothing is known of them; give some with fit(data)"
            return (Change("", f"no inputs are scaled: {why}", done=False),)
        groups, reasons = find_groups(model, context)
        refused: dict[str, list[str]] = {}
        for layer, reason in reasons.items():
            refused.setdefault(reason, []).append(layer)
        batches = 1 if all(group.untraced is None for group in groups) else WATCHED
        before = outputs_of(model, context, batches) if groups else []
        found = self._search(model, context, groups)
        changes, undos = _apply(model, found)
        if undos and not agree(before, outputs_of(model, context, batches)):
            for undo in reversed(undos):
                undo()
            changes = []
            for one in found:
                alone, undos = _apply(model, [one])
                if undos and not agree(before, outputs_of(model, context, batches)):
                    undos[0]()
                    alone = [_refused(one.group.layers, "it changes the model's outputs")]
                changes += alone
        return (*changes, *(_refused(layers, reason) for reason, layers in refused.items()))

    def _search(
        self, model: nn.Module, context: TransformContext, groups: Sequence[Group]
    ) -> list["_Found"]:
        """Return the best scale of each group, or why none is good."""
        wanted = [
            layer for one in groups for layer in one.layers if weight_of(layer) in context.targets
        ]
        inputs = inputs_of(model, context, wanted)
        found: list[_Found] = []
        quiet = not context.progress
        for group in shown(groups, type(self).kind, "group", quiet=quiet):
            consumers = [
                Consumer(
                    layer,
                    model.get_submodule(layer),
                    context.targets[weight_of(layer)],
                    inputs[layer],
                )
                for layer in group.layers
                if layer in inputs
            ]
            reason = self.refuse(consumers) if consumers else "no data reaches them"
            if reason is not None:
                found.append(_Found(group, reason=reason))
                continue
            found.append(_best(group, consumers, self.scales(group, consumers)))
        return found


def exponents(alpha: float | None, steps: int) -> list[float]:
    """Return the exponents that are tried: one that was given, or `steps` + 1 from 0 to 1."""
    return [alpha] if alpha is not None else [place / steps for place in range(steps + 1)]


def check_alpha(_: object, __: object, alpha: float | None) -> None:
    """Refuse an exponent that is not between 0 and 1."""
    if alpha is not None and not 0 <= alpha <= 1:
        raise ConfigurationError(f"alpha is 0 to 1, or None to have it searched, not {alpha!r}")


def check_steps(_: object, __: object, steps: int) -> None:
    """Refuse a number of steps that is none."""
    if type(steps) is not int or steps < 1:
        raise ConfigurationError(f"steps is 1 or more, not {steps!r}")


def mean_inputs(group: Group, consumers: Iterable[Consumer]) -> Tensor:
    """Return the mean magnitude of what each channel becomes, ``float64 [width]``."""
    total, count = torch.zeros(group.width, dtype=torch.float64), torch.zeros(group.width)
    for consumer in consumers:
        places = group.channels[consumer.path]
        known = places >= 0
        total.index_add_(0, places[known], consumer.inputs.mean[known])
        count.index_add_(0, places[known], torch.ones(int(known.sum())))
    return total / count.clamp(min=1)


def peak_inputs(group: Group, consumers: Iterable[Consumer]) -> Tensor:
    """Return the largest magnitude of what each channel becomes, ``float64 [width]``."""
    return _peaks(group, ((one.path, one.inputs.peak) for one in consumers))


def peak_columns(group: Group, consumers: Iterable[Consumer]) -> Tensor:
    """Return the largest magnitude of the weights that meet each channel, ``float64 [width]``."""

    def columns(layer: nn.Module) -> Tensor:
        weight = layer.get_parameter("weight").detach()
        return matrices(layer, weight).abs().amax((1, 3)).flatten().to("cpu", torch.float64)

    return _peaks(group, ((one.path, columns(one.layer)) for one in consumers))


def _peaks(group: Group, values: Iterable[tuple[str, Tensor]]) -> Tensor:
    peaks = torch.zeros(group.width, dtype=torch.float64)
    for path, of_inputs in values:
        places = group.channels[path]
        known = places >= 0
        peaks.scatter_reduce_(0, places[known], of_inputs[known], "amax")
    return peaks


@attrs.frozen(eq=False)
class _Found:
    """What came of a group.

    Attributes:
        group: which.
        scale: ``float64 [width]``, or None.
        exponent: that it has.
        gain_db: how much less error there is on the sample.
        reason: why there is no scale.
    """

    group: Group
    scale: Tensor | None = None
    exponent: float = 0.0
    gain_db: float = 0.0
    reason: str = ""


def _best(group: Group, consumers: Sequence[Consumer], scales: Mapping[float, Tensor]) -> _Found:
    """Return the scale that leaves the least error, or that none leaves less than no scaling."""
    none = torch.ones(group.width, dtype=torch.float64)
    without, *errors = Objective(group, consumers).errors([none, *scales.values()])
    tried = [(error, alpha) for error, alpha in zip(errors, scales, strict=True) if error < without]
    if not tried:  # NaN is not less
        return _Found(group, reason="no scale that was tried lessens their error")
    least, alpha = min(tried)
    gain_db = 10 * math.log10(without / least) if least else math.inf
    return _Found(group, scales[alpha], alpha, gain_db)


def _apply(model: nn.Module, found: Iterable[_Found]) -> tuple[list[Change], list[Undo]]:
    """Scale groups; return a change for each, and what takes back those that were done."""
    changes: list[Change] = []
    undos: list[Undo] = []
    for one in found:
        group, scale = one.group, one.scale
        undo = group.apply(model, scale) if scale is not None else one.reason
        if scale is None or isinstance(undo, str):
            changes.append(_refused(group.layers, str(undo)))
            continue
        undos.append(undo)
        low, high = (float(end) for end in scale.aminmax())
        text = (
            f"the inputs of {joined(group.layers)} are divided by {low:.3g} to {high:.3g} in "
            f"{group.source} (alpha {one.exponent:.2g}), for {one.gain_db:.2f} dB less error"
        )
        if group.untraced is not None:
            text += f"; only the data shows that all else stays as it is: {group.untraced}"
        changes.append(Change(group.source, text))
    return changes, undos


def _refused(layers: Sequence[str], reason: str) -> Change:
    text = f"the inputs of {joined(layers)} are not scaled: {reason}"
    return Change(layers[0], text, done=False)
