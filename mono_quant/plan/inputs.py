"""What the inputs of quantized layers are like, and how they use the grid that they are put on."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import Activation, QuantizedModule, Scheme
from mono_quant.evidence import InputReport
from mono_quant.numerics.granularity import PerToken
from mono_quant.numerics.histogram import HistogramState, evenly_spread, merge, observe
from mono_quant.numerics.metrics import SquaredError
from mono_quant.numerics.values import QParams
from mono_quant.plan.drawn import BINS, distribution
from mono_quant.plan.request import WeightPlan
from mono_quant.schemes import Affine

_ENOUGH_CHANNELS = 8
"""Of fewer channels, the median one says nothing."""

_SAMPLE = 1 << 15
"""Values of an input that are put on grids to try them: evenly spread, and as many or fewer."""

FoldT = TypeVar("FoldT", "Channels", Tensor)


@attrs.frozen(eq=False)
class Channels:
    """The size of each channel of the inputs that a weight meets: a fold.

    Attributes:
        peaks: the largest magnitude in each channel, float64 ``[channels]``.
        squares: the sum of the squares of each, float64 ``[channels]``.
    """

    peaks: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor, dim: int) -> "Channels":
        """Return those of one input, whose channels lie along a dimension."""
        others = [place for place in range(x.dim()) if place != dim % x.dim()]
        if not others:
            return cls(x.abs().to(torch.float64), x.to(torch.float64).square())
        peaks = torch.maximum(x.amax(others), -x.amin(others)).to(torch.float64)
        norms = torch.linalg.vector_norm(x, dim=others, dtype=torch.float64)
        return cls(peaks, norms.square())

    def __add__(self, other: "Channels") -> "Channels":
        """Return those of both."""
        peaks = torch.maximum(self.peaks, other.peaks)
        return Channels(peaks, self.squares + other.squares)

    @property
    def outliers(self) -> float | None:
        """How far one dwarfs the median one, by root mean square or by maximum; None if unknown."""
        found = [_over_median(self.squares.sqrt()), _over_median(self.peaks)]
        return max((one for one in found if one is not None), default=None)


@attrs.frozen(eq=False)
class InputUse:
    """What was seen of the inputs that a weight meets: a fold over calls.

    Attributes:
        low: the smallest value.
        high: the largest.
        count: how many values there were.
        histogram: of them.
        channels: None where the layer's quantizer does not say what a channel is.
        cut: the error of cutting values off at the ends of a calibrated range.
        beyond: how many were cut off.
        codes: how often values other than zero fell on each code of a calibrated range, of a
            sample; None for other grids.
        gain_db: how much less error a range of its own would leave in a row, in dB, summed over a
            sample of rows that share one range.
        rows: how many rows those are.
    """

    low: float
    high: float
    count: int
    histogram: HistogramState
    channels: Channels | None
    cut: SquaredError = attrs.field(factory=SquaredError)
    beyond: int = 0
    codes: Tensor | None = None
    gain_db: float = 0.0
    rows: int = 0

    @classmethod
    def of(cls, x: Tensor, dim: int | None, activation: Activation) -> "InputUse | None":
        """Return what one input tells; None for an empty one, indices, NaN or infinity.

        Features that stay float count as zeros.

        Args:
            x: the input, as the layer's operation takes it.
            dim: the dimension of its channels, if that is known.
            activation: how it is quantized.
        """
        if not x.numel() or not x.is_floating_point():
            return None
        x = activation.rest(x)
        low, high = (float(end) for end in torch.aminmax(x))
        if not math.isfinite(low) or not math.isfinite(high):
            return None
        channels = Channels.of(x, dim) if dim is not None else None
        found = cls(low, high, x.numel(), observe(x, BINS), channels)
        if activation.scale is not None:
            found = found._on_calibrated(x, activation, activation.scale)
        if dim == -1 and not isinstance(activation.scheme.granularity, PerToken):
            found = found._by_rows(x, activation)
        return found

    def __add__(self, other: "InputUse") -> "InputUse":
        """Return what both tell."""
        return InputUse(
            min(self.low, other.low),
            max(self.high, other.high),
            self.count + other.count,
            merge(self.histogram, other.histogram, BINS),
            _added(self.channels, other.channels),
            self.cut + other.cut,
            self.beyond + other.beyond,
            _added(self.codes, other.codes),
            self.gain_db + other.gain_db,
            self.rows + other.rows,
        )

    def report(self, name: str, activation: Activation) -> InputReport:
        """Return the evidence in figures, for the weight of a name."""
        crowded = None
        if self.codes is not None and int(self.codes.sum()):
            crowded = int(self.codes.topk(2).values.sum()) / int(self.codes.sum())
        return InputReport(
            name=name,
            low=self.low,
            high=self.high,
            outliers=self.channels.outliers if self.channels is not None else None,
            cut=self.beyond / self.count if activation.scale is not None else None,
            cut_energy=self.cut.noise / self.cut.signal if self.cut.signal else None,
            uncut_gain_db=self._uncut_gain_db(activation),
            crowded=crowded,
            per_token_gain_db=self.gain_db / self.rows if self.rows else None,
            histogram=distribution(self.histogram, _covered(activation)),
        )

    def _on_calibrated(self, x: Tensor, activation: Activation, scale: Tensor) -> "InputUse":
        """Return this with what a calibrated range does to `x`."""
        scheme, half = activation.scheme, float(scale) / 2
        beyond, lost = 0, 0.0
        for sign, end in zip((-1, 1), _covered(activation) or (), strict=True):
            if sign * (self.high if sign > 0 else self.low) > sign * end + half:
                values = x[sign * x > sign * end + half].to(torch.float64)
                beyond += values.numel()
                lost += float((values - end).square().sum())
        signal = float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
        codes = None
        if scheme.code_bits is not None:
            sample = evenly_spread(x.reshape(-1), _SAMPLE)
            sample = sample[sample != 0]
            found = scheme.quantize(sample, activation.qparams(sample)).codes
            places = found.to(torch.int64) - scheme.code_min
            codes = torch.bincount(places, minlength=1 << scheme.code_bits)
        cut = SquaredError(signal, lost, x.numel())
        return attrs.evolve(self, cut=cut, beyond=beyond, codes=codes)

    def _by_rows(self, x: Tensor, activation: Activation) -> "InputUse":
        """Return this with what ranges for each row would gain."""
        if not isinstance(activation.scheme, Affine):
            return self
        rows = x.reshape(-1, x.shape[-1])
        rows = rows[:: max(1, -(-rows.numel() // _SAMPLE))].to(torch.float32)
        whole = activation.qparams(x)
        if whole.scale is None:
            return self
        zero_point = whole.zero_point.reshape(1, 1) if whole.zero_point is not None else None
        shared = QParams(whole.scale.reshape(1, 1), zero_point, tuple(rows.shape))
        apart = attrs.evolve(activation.scheme, granularity=PerToken())
        together = _row_noise(rows, activation.scheme, shared)
        each = _row_noise(rows, apart, apart.dynamic_qparams(rows))
        told = (together > 0) & (each > 0)
        gains = 10 * (together[told] / each[told]).log10()
        return attrs.evolve(self, gain_db=float(gains.sum()), rows=gains.numel())

    def _uncut_gain_db(self, activation: Activation) -> float | None:
        """Return how much less error the whole range would leave than what is cut off alone, in dB.

        The error on a grid of step d is taken to be ``d ** 2 / 12`` a value.
        """
        scheme = activation.scheme
        if not self.cut.noise or not isinstance(scheme, Affine):
            return None
        steps = (1 << scheme.bits) - 1
        step = (max(self.high, 0.0) - min(self.low, 0.0)) / steps
        if scheme.symmetric:
            step = 2 * max(self.high, -self.low) / steps
        return 10 * math.log10(self.cut.noise / (self.count * step**2 / 12))


@attrs.frozen(eq=False)
class InputUses:
    """What is seen of the inputs that are quantized, by the dotted names of the weights they meet.

    Attributes:
        model: the quantized model.
        seen: after `see` was called.
    """

    model: nn.Module
    seen: dict[str, InputUse] = attrs.field(factory=dict)

    def see(
        self,
        weights: Sequence[WeightPlan],
        layer: nn.Module,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
    ) -> None:
        """Look at one call of a float layer, whose weights these are."""
        quantized = {one.name: (one, how) for one in weights if (how := self.activation(one))}
        if not quantized:
            return
        maker = weights[0].maker
        for name, x in maker.inputs(layer, args, kwargs):
            if name not in quantized:
                continue
            weight, activation = quantized[name]
            found = InputUse.of(x.detach(), maker.channel_dim(layer, name), activation)
            if found is not None:
                before = self.seen.get(weight.key)
                self.seen[weight.key] = found if before is None else before + found

    def reports(self, weights: Iterable[WeightPlan]) -> Mapping[str, InputReport]:
        """Return the evidence by the weights' names, of those whose inputs were seen."""
        return {
            weight.key: self.seen[weight.key].report(weight.key, activation)
            for weight in weights
            if weight.key in self.seen and (activation := self.activation(weight)) is not None
        }

    def activation(self, weight: WeightPlan) -> Activation | None:
        """Return how the inputs of a weight are quantized; None for floats."""
        layer = self.model.get_submodule(weight.path)
        if not isinstance(layer, QuantizedModule):
            return None
        return layer.activations().get(weight.name)


def _covered(activation: Activation) -> tuple[float, float] | None:
    """Return the ends of a calibrated grid; None for one that is found anew for each input."""
    if activation.scale is None:
        return None
    reach = torch.tensor([-1.0, 1.0], device=activation.scale.device)
    reach = reach * torch.finfo(torch.float32).max
    low, high = activation.fake_quantize(reach).tolist()  # clamped to the ends of the grid
    return low, high


def _over_median(sizes: Tensor) -> float | None:
    """Return the largest over the median; None if that is zero, or there are too few to tell."""
    if sizes.numel() < _ENOUGH_CHANNELS:
        return None
    median = float(sizes.median())
    return float(sizes.max()) / median if median > 0 else None


def _added(one: FoldT | None, other: FoldT | None) -> FoldT | None:
    return one + other if one is not None and other is not None else None


def _row_noise(rows: Tensor, scheme: Scheme, qparams: QParams) -> Tensor:
    """Return the squared error of each row on a grid, float64 ``[n]``."""
    return (scheme.fake_quantize(rows, qparams) - rows).to(torch.float64).square().sum(1)
