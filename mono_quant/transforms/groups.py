"""Layers whose inputs may be scaled, each group with the module that makes up for it."""

from collections.abc import Iterable, Mapping

import attrs
from torch import Tensor, nn

from mono_quant.base import QuantizedModule, TransformContext
from mono_quant.transforms.gains import Gain, gain_of
from mono_quant.transforms.graph import Graph
from mono_quant.transforms.probing import Channels, Link, Probe, width_of
from mono_quant.transforms.rescaling import (
    Rescaling,
    Undo,
    kind_of,
    layout_of,
    refuse,
    shared,
    watched,
)
from mono_quant.transforms.tracing import trace
from mono_quant.transforms.watching import seen

WATCHED = 8
"""Batches that a model is watched on if it cannot be traced."""

_TRIES = 3
"""How many modules are tried for each layer whose input no module returned."""


@attrs.frozen(eq=False)
class Group:
    """A module, and the layers that alone see its output.

    Attributes:
        source: dotted name of the module: a norm or a layer.
        width: how many channels it puts out.
        gain: how it scales its output; None of a layer.
        channels: which of them each channel of a layer's input comes from.
        untraced: why only the example data shows it; None where the model's code does.
    """

    source: str
    width: int
    gain: Gain | None
    channels: Channels
    untraced: str | None

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers' dotted names."""
        return tuple(self.channels)

    def spread(self, scale: Tensor, layer: str) -> Tensor:
        """Return values of the output's channels for those of a layer's input, 1 for others.

        Args:
            scale: ``[width]``.
            layer: dotted name.
        """
        places = self.channels[layer]
        return scale[places.clamp(min=0)].masked_fill(places < 0, 1.0)

    def apply(self, model: nn.Module, scale: Tensor) -> Undo | str:
        """Divide the output by `scale` and multiply the layers' columns by it.

        Args:
            model: holds the group.
            scale: float64 ``[width]``, on the CPU.

        Returns:
            what takes it back, or why nothing was changed.
        """
        undos: list[Undo] = []

        def undo() -> None:
            for back in reversed(undos):
                back()

        for path in (self.source, *self.layers):
            found = self._rescale(model.get_submodule(path), path, scale)
            if isinstance(found, str):
                undo()
                return f"of {path!r}: {found}"
            undos.append(found)
        return undo

    def _rescale(self, module: nn.Module, path: str, scale: Tensor) -> Undo | str:
        if path != self.source:
            return Rescaling(inputs=self.spread(scale, path)).apply(module)
        if self.gain is not None:
            return self.gain.apply(module, 1 / scale)
        return Rescaling(outputs=1 / scale).apply(module)


def weight_of(layer: str) -> str:
    """Return the dotted name of a layer's weight."""
    return f"{layer}.weight" if layer else "weight"


def find_groups(
    model: nn.Module, context: TransformContext
) -> tuple[tuple[Group, ...], Mapping[str, str]]:
    """Return the groups whose inputs may be scaled, and why those of other layers may not be.

    Of layers that are going to be quantized; each is in one group at most. The model's code tells
    who sees what; where it cannot be traced, the data does: a layer then belongs to a module if it
    is given the very tensor that the module returned, or, where its tensor comes from a function,
    to one of the last layers whose output no module was given. Either way it is tried on the data
    whether a factor in each channel arrives there as it is, and arrives nowhere else (see `Probe`).

    Args:
        model: the float model.
        context: with data.
    """
    return _Search(model, context).run()


class _Search:
    """One model whose groups are looked for."""

    def __init__(self, model: nn.Module, context: TransformContext) -> None:
        """Find out how `model` is wired."""
        found = {path: gain_of(module) for path, module in model.named_modules() if path}
        self._model = model
        self._context = context
        self._gains = {path: gain for path, gain in found.items() if gain is not None}
        steps = frozenset(self._gains)
        self._graph = trace(model, steps)
        if self._graph.reason is not None:
            self._graph = seen(model, context, self._graph.reason, WATCHED, steps)
        self._probe = Probe(model, context, self._gains)
        self._found: dict[str, Group] = {}  # by the layer
        self._reasons: dict[str, str] = {}

    def run(self) -> tuple[tuple[Group, ...], Mapping[str, str]]:
        """Return groups and refusals."""
        wanted = [
            path
            for path, module in self._model.named_modules()
            if kind_of(module) is not None
            and not isinstance(module, QuantizedModule)
            and weight_of(path) in self._context.targets
        ]
        self._try(self._links(wanted))
        if not self._graph.traced:
            guesses = _guesses(self._model, self._graph, wanted)
            for place in range(_TRIES):
                links = [
                    Link(sources[place], (layer,))
                    for layer, sources in guesses.items()
                    if layer not in self._found and len(sources) > place
                ]
                self._try([link for link in links if self._fits(link)])
        left = [path for path in wanted if path not in self._found]
        why = {path: self._reasons.get(path) or self._why(path) for path in left}
        others = {weight.rpartition(".")[0] for weight in self._context.targets}
        for path in sorted(others.difference(wanted)):
            kind = type(self._model.get_submodule(path)).__name__
            why[path] = f"scales are moved into Linears and convolutions, not into a {kind}"
        return tuple(dict.fromkeys(self._found.values())), why

    def _why(self, layer: str) -> str:
        """Return why a layer that is in no link cannot be scaled."""
        source = self._graph.source(layer)
        if source.path is None or source.path not in self._gains:
            return source.text
        reason = self._graph.reach(source.path).reason
        return f"of {source.path!r}: {reason}" if reason is not None else source.text

    def _links(self, wanted: Iterable[str]) -> list[Link]:
        """Return what the graph knows, each layer in one link; take note of what it refuses."""
        wanted = frozenset(wanted)
        links: list[Link] = []
        claimed: set[str] = set()
        for path, module in self._model.named_modules():
            if path not in self._gains and kind_of(module) is None:
                continue
            reach = self._graph.reach(path)
            if wanted.isdisjoint(reach.layers) or not claimed.isdisjoint(reach.layers):
                continue
            link = Link(path, reach.layers)
            if reach.reason is not None:
                self._refuse(link, f"of {path!r}: {reach.reason}")
            elif self._fits(link):
                links.append(link)
                claimed.update(link.layers)
        return links

    def _fits(self, link: Link) -> bool:
        """Return whether parameters may be changed; take note of it if not."""
        reason = self._unfit(link)
        if reason is not None:
            self._refuse(link, reason)
        return reason is None

    def _unfit(self, link: Link) -> str | None:
        source, model = link.source, self._model
        module = model.get_submodule(source)
        if source in self._gains:
            reason = shared(model, source)
        else:
            reason = refuse(model, source, link.layers[0])
            target = self._context.targets.get(weight_of(source))
            if reason is None and target is not None:
                scheme = target.grid.scheme
                block = scheme.granularity.block_size(layout_of(module).stack)
                if scheme.code_bits is not None and block[:2] != (1, 1):
                    reason = f"rows of {source!r} share a scale, so that it would be rounded worse"
        if reason is not None:
            return reason
        for layer in link.layers:
            if (reason := self._graph.uncertain(layer)) is not None:
                return f"of {layer!r}: {reason}"
            reason = watched(model, source, layer) or refuse(model, layer, source)
            if reason is not None:
                return reason
        return None

    def _refuse(self, link: Link, reason: str) -> None:
        for layer in link.layers:
            self._reasons.setdefault(layer, reason)

    def _try(self, links: list[Link]) -> None:
        for link, channels in self._probe.channels(links).items():
            if isinstance(channels, str):
                self._refuse(link, f"of {link.source!r}: {channels}")
                continue
            source = self._model.get_submodule(link.source)
            width = width_of(source, self._gains, link.source)
            gain = self._gains.get(link.source)
            group = Group(link.source, width, gain, channels, self._graph.reason)
            self._found |= dict.fromkeys(link.layers, group)


def _guesses(model: nn.Module, graph: Graph, wanted: Iterable[str]) -> Mapping[str, list[str]]:
    """Return, by layers whose input no module returned, whose output it may come from.

    Layers whose output no module was given, since the last such input; the latest first.
    """
    found: dict[str, list[str]] = {}
    layers, open_ = frozenset(wanted), list[str]()
    for path in graph.views[0].calls if graph.views else ():
        if kind_of(model.get_submodule(path)) is None or graph.calls(path) != 1:
            continue
        if graph.source(path).path is None:
            if path in layers:
                found[path] = open_[::-1]
            open_ = []
        if not graph.reach(path).layers:
            open_.append(path)
    return found
