"""Which module's output goes where: what transforms have to know before they move a scale."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import attrs
from torch import nn

from mono_quant.transforms.activation import Nonlinearity

FoundT = TypeVar("FoundT")

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Layers whose output is affine in their input, channel by channel."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Batch normalizations, which in eval mode are affine in their input, channel by channel."""

IDLE = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
"""What returns its input in eval mode."""


@attrs.frozen
class Chain:
    """What alone takes the output of a module: perhaps an activation, then perhaps a module.

    `nn.Identity` and dropout, which do nothing in eval mode, are passed over; so are questions
    about the output's shape.

    Attributes:
        activation: what is computed on the output before anything else.
        activation_path: dotted name of the module that does it; None for a function.
        then: dotted name of the module that alone takes the result, and takes nothing else.
        reason: why nothing more is known, where `then` is None.
        dropout: whether a dropout comes before the activation, which is more than nothing in train
            mode.
    """

    activation: Nonlinearity | None = None
    activation_path: str | None = None
    then: str | None = None
    reason: str | None = None
    dropout: bool = False


@attrs.frozen
class Source:
    """Where the one input of a module comes from.

    Attributes:
        path: dotted name of the module whose output it is, or None.
        text: what it is, in words.
    """

    path: str | None
    text: str


@attrs.frozen
class Reach:
    """The layers that see the output of a module, each element with its factor.

    Between the module and a layer are only steps that pass a scale on: what moves, repeats, sums or
    averages elements, products with other tensors, ReLU. Which channel of a layer's input comes
    from which channel of the output is not said.

    Attributes:
        layers: their dotted names, in the order in which they are called.
        reason: who else sees the output, so that it cannot be scaled; None if nobody does.
    """

    layers: tuple[str, ...] = ()
    reason: str | None = None


@attrs.frozen(eq=False)
class View:
    """A model's calls, for one way of calling it.

    Attributes:
        calls: how often each module is called.
        chains: what follows each module that is called once.
        sources: where the input of each module comes from that is called once.
        reaches: which layers see the output of each module that is called once.
        matrices: modules whose input is known to be a matrix ``[N, C]``.
        misused: why the parameters of a module cannot be changed, by its name.
    """

    calls: Mapping[str, int]
    chains: Mapping[str, Chain]
    sources: Mapping[str, Source]
    reaches: Mapping[str, Reach] = attrs.field(factory=dict)
    matrices: frozenset[str] = frozenset()
    misused: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen(eq=False)
class Graph:
    """What is known of a model's calls, from all ways of calling it that were looked into.

    Attributes:
        views: one for each way of calling the model; none where nothing is known.
        reason: why the model was not traced; None where it was. Without a trace, what was seen on
            example data is no proof: functions between modules are not seen.
    """

    views: tuple[View, ...]
    reason: str | None = None

    @property
    def traced(self) -> bool:
        """Whether the model's own code was followed."""
        return self.reason is None

    def chain(self, path: str) -> Chain:
        """Return what follows a module, or why that is not known."""
        if (reason := self.uncertain(path)) is not None:
            return Chain(reason=reason)
        found = self._agreed(path, lambda view: view.chains[path])
        if found is None:
            return Chain(reason="what follows it depends on how the model is called")
        if found.then is not None and not self.together(path, found.then):
            why = f"{found.then!r} is also called without it"
            return attrs.evolve(found, then=None, reason=why)
        return found

    def source(self, path: str) -> Source:
        """Return where the input of a module comes from, as far as it is known."""
        if (reason := self.uncertain(path)) is not None:
            return Source(None, reason)
        found = self._agreed(path, lambda view: view.sources[path])
        return found or Source(None, "its input depends on how the model is called")

    def reach(self, path: str) -> Reach:
        """Return which layers see the output of a module, and why it cannot be scaled if so."""
        if (reason := self.uncertain(path)) is not None:
            return Reach((), reason)
        found = self._agreed(path, lambda view: view.reaches.get(path, Reach((), self.reason)))
        if found is None:
            return Reach((), "who sees its output depends on how the model is called")
        if found.reason is None:
            for layer in found.layers:
                if not self.together(path, layer):
                    return Reach(found.layers, f"{layer!r} is also called without it")
        return found

    def uncertain(self, path: str) -> str | None:
        """Return why a module's one call is not all that its parameters are for, or None."""
        if not self.views:
            return self.reason
        for view in self.views:
            if path in view.misused:
                return view.misused[path]
            if (count := view.calls.get(path, 0)) > 1:
                return f"it is called {count} times"
        return None if self._where(path) else "the model does not call it"

    def calls(self, path: str) -> int:
        """Return how often a module is called at most, as far as it is known."""
        return max((view.calls.get(path, 0) for view in self.views), default=0)

    def together(self, one: str, other: str) -> bool:
        """Return whether two modules are called in the same ways of calling the model."""
        return self._where(one) == self._where(other)

    def takes_matrices(self, path: str) -> bool:
        """Return whether a module's input is known to be a matrix ``[N, C]``."""
        called = [view for view in self.views if view.calls.get(path)]
        return bool(called) and all(path in view.matrices for view in called)

    def _where(self, path: str) -> list[int]:
        """Return the numbers of the views in which a module is called."""
        return [place for place, view in enumerate(self.views) if view.calls.get(path)]

    def _agreed(self, path: str, read: Callable[[View], FoundT]) -> FoundT | None:
        """Return what all views say in which the module is called, or None."""
        found = [read(view) for view in self.views if view.calls.get(path)]
        return found[0] if all(one == found[0] for one in found) else None
