"""Which channel of a layer's input comes from which of another module's output: tried on data.

The output is multiplied by powers of two, a different one in each channel, and the layers' inputs
are divided by what arrives there. Floating point arithmetic does both exactly, so the inputs are
then to the bit what they were, and so are the model's outputs, unless somebody else sees the output
or something between does not pass a factor on.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import TransformContext
from mono_quant.transforms.gains import Gain
from mono_quant.transforms.rescaling import dimensions, kind_of, widths
from mono_quant.transforms.watching import outputs_of

NOWHERE = -1
"""Stands for a channel that does not come from the module."""

_NO_FACTOR = "a factor of it does not reach {!r} as it is, on the data"
_BITS = {torch.float16: 2}
_DEFAULT_BITS = 4  # factors up to 2 ** 15 in a run


@attrs.frozen
class Link:
    """A module and the layers that alone see its output, as far as that is known.

    Attributes:
        source: dotted name of the module.
        layers: those of the layers.
    """

    source: str
    layers: tuple[str, ...]


Channels = Mapping[str, Tensor]
"""By the name of a layer, for each channel of its input the one of the output that it comes from.

``int64 [in]``, on the CPU; `NOWHERE` where it comes from elsewhere.
"""


def channel_dim(module: nn.Module) -> int:
    """Return which dimension counts the channels of inputs and outputs, from the end."""
    return -1 - dimensions(module) if kind_of(module) is not None else -1


def width_of(module: nn.Module, gains: Mapping[str, Gain], path: str) -> int:
    """Return how many channels a module puts out: one of `LAYERS`, or one with a gain."""
    return gains[path].width if path in gains else widths(module)[1]


class Probe:
    """Tries links of a model on the first batch of the data."""

    def __init__(
        self, model: nn.Module, context: TransformContext, gains: Mapping[str, Gain]
    ) -> None:
        """Get ready to try links of `model`; nothing runs yet.

        Args:
            model: the model.
            context: with data.
            gains: how modules scale their outputs, by the names of those that are no layers.
        """
        self._model = model
        self._context = context
        self._gains = gains

    def channels(self, links: Sequence[Link]) -> dict[Link, Channels | str]:
        """Return where the channels of each link's layers come from, or why it is none.

        No layer may be in two links. All are tried at once; if that fails, halves of them.
        """
        if not links:
            return {}
        clean = _Run(self._model, links)
        outputs = clean.outputs(self._context)
        if not _same(outputs, _Run(self._model, links).outputs(self._context)):
            why = "two runs on the same data are not equal to the bit, so that nothing can be tried"
            return dict.fromkeys(links, why)
        found: dict[Link, Channels | str] = {}
        todo = [list(links)]
        while todo:
            tried = todo.pop()
            result = self._try(tried, clean, outputs)
            if not isinstance(result, str):
                found |= result
            elif len(tried) == 1:
                found[tried[0]] = result
            else:
                middle = len(tried) // 2
                todo += [tried[middle:], tried[:middle]]
        return found

    def _try(
        self, links: Sequence[Link], clean: "_Run", outputs: Sequence[Sequence[Tensor]]
    ) -> Mapping[Link, Channels] | str:
        """Read the number of each channel, some bits at a time, then have it foretell a run."""
        modules = {link.source: self._model.get_submodule(link.source) for link in links}
        sizes = {path: width_of(one, self._gains, path) for path, one in modules.items()}
        dtypes = {one.dtype for module in modules.values() for one in module.parameters()}
        bits = min(_BITS.get(dtype, _DEFAULT_BITS) for dtype in dtypes)
        numbers = {  # from 1 on: 0 is a channel from elsewhere
            layer: torch.zeros(clean.peaks[layer].shape, dtype=torch.int64)
            for link in links
            for layer in link.layers
            if layer in clean.peaks
        }
        places = range(0, max(sizes.values()).bit_length(), bits)
        for place in places:
            shifts = {
                path: (torch.arange(1, size + 1) >> place) % (1 << bits)
                for path, size in sizes.items()
            }
            run = _Run(self._model, links, shifts, clean.peaks)
            reason = run.differs(clean, self._context, outputs)
            if reason is not None:
                return reason
            for layer, exponents in run.exponents.items():
                numbers[layer] += exponents.to(torch.int64) << place
        result: dict[Link, Channels] = {}
        for link in links:
            channels: dict[str, Tensor] = {}
            for layer in link.layers:
                if layer not in numbers or not bool(numbers[layer].any()):
                    return f"nothing of it reaches {layer!r} on the data"
                dead = clean.peaks[layer] == 0
                known = _completed(numbers[layer] - 1, dead, sizes[link.source])
                if known is None:
                    return f"the input of {layer!r} is zero on the data in some channels"
                channels[layer] = known
            result[link] = channels
        return self._foretold(result, clean, outputs, sizes, bits) or result

    def _foretold(
        self,
        found: Mapping[Link, Channels],
        clean: "_Run",
        outputs: Sequence[Sequence[Tensor]],
        sizes: Mapping[str, int],
        bits: int,
    ) -> str | None:
        """Return why the channels do not tell what scaling by other powers does, or None."""
        generator = torch.Generator().manual_seed(0)
        shifts = {
            path: torch.randint(1 << bits, (size,), generator=generator)
            for path, size in sizes.items()
        }
        run = _Run(self._model, list(found), shifts, clean.peaks)
        if (reason := run.differs(clean, self._context, outputs)) is not None:
            return reason
        for link, channels in found.items():
            for layer, places in channels.items():
                if int(places.max()) >= sizes[link.source]:
                    return _NO_FACTOR.format(layer)
                expected = shifts[link.source][places.clamp(min=0)] * (places != NOWHERE)
                seen = clean.peaks[layer] != 0
                if not torch.equal(run.exponents[layer][seen].long(), expected[seen]):
                    return _NO_FACTOR.format(layer)
        return None


class _Run:
    """One run on the first batch, the sources' outputs scaled and the layers' inputs scaled back.

    Attributes:
        peaks: the largest magnitude in each channel of its input, ``[in]``, by the layer's name; of
            a clean run.
        exponents: log2 of the factor in each channel, ``float64 [in]``, by the layer's name; of a
            run that scales.
        sums: of the bits of its input, once it is scaled back.
    """

    def __init__(
        self,
        model: nn.Module,
        links: Sequence[Link],
        shifts: Mapping[str, Tensor] | None = None,
        clean: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Get ready to scale each source by 2 to the power of its `shifts`, or none at all."""
        self._model = model
        self._links = links
        self._shifts = shifts or {}
        self._clean = clean
        self.peaks: dict[str, Tensor] = {}
        self.exponents: dict[str, Tensor] = {}
        self.sums: dict[str, int] = {}

    def outputs(self, context: TransformContext) -> list[list[Tensor]]:
        """Run the model and return its outputs."""
        with ExitStack() as hooks:
            for link in self._links:
                module = self._model.get_submodule(link.source)
                if (shift := self._shifts.get(link.source)) is not None:
                    scale = partial(_scaled, shift)
                    hooks.callback(module.register_forward_hook(scale).remove)
                for layer in link.layers:
                    handle = self._model.get_submodule(layer).register_forward_pre_hook(
                        partial(self._given, layer), with_kwargs=True
                    )
                    hooks.callback(handle.remove)
            return outputs_of(self._model, context, 1)

    def differs(
        self, clean: "_Run", context: TransformContext, outputs: Sequence[Sequence[Tensor]]
    ) -> str | None:
        """Run the model and return what is not as it was in a clean run, or None."""
        try:
            after = self.outputs(context)
        except Exception as error:  # of anybody's code, which may check what it is given
            return f"the model fails on the data once its output is scaled ({error})"
        for layer, exponents in self.exponents.items():
            if not bool((exponents.frac() == 0).all()) or self.sums[layer] != clean.sums[layer]:
                return _NO_FACTOR.format(layer)
        if not _same(outputs, after):
            return "something else sees its output, for the model's outputs change on the data"
        return None

    def _given(
        self, path: str, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """See the first tensor that a layer is given, and scale it back."""
        given = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(given, Tensor) or not given.numel():
            return args, kwargs
        dim = channel_dim(module)
        others = [place for place in range(given.dim()) if place != given.dim() + dim]
        peaks = given.detach().abs().amax(others) if others else given.detach().abs()
        if self._clean is None:
            self.peaks[path] = peaks.to("cpu")
        else:
            before = self._clean[path].to(torch.float64)
            ratio = peaks.to("cpu", torch.float64) / before
            exponents = torch.where(before == 0, 0.0, ratio.log2())
            self.exponents[path] = exponents
            back = _along(torch.exp2(-exponents), given, dim)
            given = given * back
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[given.element_size()]
        self.sums[path] = int(given.detach().contiguous().view(kind).sum(dtype=torch.int64))
        if args:
            return (given, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): given}


def _scaled(shift: Tensor, module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output * _along(torch.exp2(shift.to(torch.float64)), output, channel_dim(module))


def _along(values: Tensor, x: Tensor, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return values.to(x.device, x.dtype).reshape(shape)


def _completed(channels: Tensor, unseen: Tensor, size: int) -> Tensor | None:
    """Return channels of which some were all zero on the data, or None where they are not known.

    Where all others are in order, each as often as the next, so are they: directly behind the
    module, or flattened.
    """
    if not bool(unseen.any()):
        return channels
    times, rest = divmod(len(channels), size)
    in_order = torch.arange(size).repeat_interleave(times)
    fits = not rest and torch.equal(channels[~unseen], in_order[~unseen])
    return in_order if fits else None


def _same(one: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> bool:
    """Return whether outputs are equal to the bit, NaN where NaN was."""
    pairs = [
        (x, y)
        for before, after in zip(one, other, strict=True)
        for x, y in zip(before, after, strict=True)
    ]
    return all(
        x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all()) for x, y in pairs
    )
