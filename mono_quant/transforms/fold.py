"""Batch normalization folded into the layer before it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import attrs
from torch import nn

from mono_quant.base import WITHOUT_DATA, Change, Edit, Transform, TransformContext
from mono_quant.configurable import register
from mono_quant.transforms import edits
from mono_quant.transforms.graph import NORMS, Graph
from mono_quant.transforms.norms import rescaling_of, unfit
from mono_quant.transforms.rescaling import (
    Undo,
    has_own_forward,
    kind_of,
    refuse,
    watched,
    widths,
)
from mono_quant.transforms.tracing import trace
from mono_quant.transforms.watching import agree, outputs_of, seen, watch

_BATCHES = 8
"""Batches that a model is watched on if it cannot be traced."""

_MAYBE_NO_MATRIX = (
    "it is not known to see [N, C] alone; on [N, C, L], where the features of a Linear are L, it "
    "works on another dimension"
)

_NONE: Mapping[str, str] = MappingProxyType({})

_NORM_OF: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
}


@register
@attrs.frozen
class FoldBatchNorm(Transform):
    """Folds batch normalizations into the Linear or convolution whose output they alone take.

    In eval mode a batch normalization is ``y * scale + shift`` with one scale and shift a channel,
    ``scale = weight / sqrt(running_var + eps)`` and ``shift = bias - running_mean * scale``, so the
    layer before it can do it: ``W' = scale * W`` and ``b' = scale * b + shift``, computed in
    float64 and rounded once to the layer's dtype. The normalization becomes an `nn.Identity`, and a
    layer without bias is given one.

    Which module feeds which is read from the model's code by symbolic tracing. A model that cannot
    be traced is watched on the example data instead. With data, the folded model's outputs are
    compared with those before, and what moves them is taken back. Every batch normalization that
    stays is among the changes with its reason.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", section 3.2, https://arxiv.org/abs/1712.05877.
    """

    kind: ClassVar[str] = "fold_batch_norm"

    def foresee(self, model: nn.Module, *, has_data: bool) -> tuple[Change, ...]:
        """Return a change for each batch normalization: folded, left alone, or up to the data."""
        norms = _norms(model)
        return _Folding(model, WITHOUT_DATA).foresee(norms, has_data=has_data) if norms else ()

    def apply(
        self, model: nn.Module, context: TransformContext = WITHOUT_DATA
    ) -> tuple[Change, ...]:
        """Fold what can be folded, in place; return a change for each batch normalization."""
        norms = _norms(model)
        return _Folding(model, context).run(norms) if norms else ()


def _norms(model: nn.Module) -> list[str]:
    named = model.named_modules()
    return [path for path, one in named if isinstance(one, NORMS) and one is not model]


class _Folding:
    """One model being folded."""

    def __init__(self, model: nn.Module, context: TransformContext) -> None:
        """Find out how `model` is wired, and what it returns."""
        self._model = model
        self._context = context
        self._graph = trace(model)
        self._untraced = self._graph.reason
        self._batches = 1 if self._graph.traced else _BATCHES
        if self._untraced is not None:
            self._graph = seen(model, context, self._untraced, self._batches)
        self._before = outputs_of(model, context, self._batches)
        self._watched: Graph | None = None

    def foresee(self, norms: Sequence[str], *, has_data: bool) -> tuple[Change, ...]:
        """Return what `run` will come to, without data; with some to come, what it will decide."""
        if has_data and self._untraced is not None:
            why = f"if the data shows what it follows, since {self._untraced}"
            return tuple(_up_to_data(norm, why) for norm in norms)
        folded: dict[str, str] = {}  # the layer's path by the normalization's
        changes: dict[str, Change] = {}
        before = -1
        while len(folded) > before:  # one that follows another is folded after it
            before = len(folded)
            for norm in norms:
                if norm in folded:
                    continue
                layer, reason = self._pair(norm, folded)
                if layer is not None:
                    folded[norm] = layer
                    changes[norm] = self._will_be(norm, layer, folded)
                elif has_data and reason == _MAYBE_NO_MATRIX:
                    changes[norm] = _up_to_data(norm, "if the data shows that it sees [N, C] alone")
                else:
                    changes[norm] = _refused(norm, reason)
        return tuple(changes[norm] for norm in norms)

    def _will_be(self, norm: str, layer: str, folded: Mapping[str, str]) -> Change:
        module = self._model.get_submodule(layer)
        first = [one for one, into in folded.items() if into == layer] == [norm]
        text = f"{norm} is to be folded into {layer}"
        if has_own_forward(module):
            text += f", if its {type(module).__name__} computes what its parameters say"
        return Change(norm, text, edits=_edits(norm, layer, first and module.bias is None))

    def run(self, norms: Sequence[str]) -> tuple[Change, ...]:
        """Fold until nothing more can be folded: a normalization may follow a folded one."""
        changes: dict[str, Change] = {}
        ready = True
        while ready:
            pairs: dict[str, str] = {}  # the layer's path by the normalization's
            for norm in norms:
                if norm in changes and changes[norm].done:
                    continue
                layer, reason = self._pair(norm)
                if layer is not None:
                    pairs[norm] = layer
                changes[norm] = _refused(norm, reason)
            folded = self._fold_all(pairs)
            changes |= folded
            ready = self._graph.traced and any(change.done for change in folded.values())
        return tuple(changes[norm] for norm in norms)

    def _pair(self, path: str, folded: Mapping[str, str] = _NONE) -> tuple[str | None, str]:
        """Return the layer that a normalization can be folded into, or None and why.

        Args:
            path: of the normalization.
            folded: layers by the normalizations that will have been folded into them by then.
        """
        norm = self._model.get_submodule(path)
        if (reason := unfit(norm)) is not None:
            return None, reason
        source = self._graph.source(path)
        if source.path is None:
            return None, source.text
        into = folded.get(source.path, source.path)
        layer = self._model.get_submodule(into)
        if (kind := kind_of(layer)) is None:
            return None, f"{source.text}, not from a Linear or convolution"
        chain = self._graph.chain(source.path)
        if chain.then != path or chain.activation is not None:
            return None, f"of {source.path!r}: {chain.reason or 'something else follows it'}"
        reason = refuse(self._model, into, path) or watched(self._model, path, into)
        if reason is not None:
            return None, reason
        if not isinstance(norm, (_NORM_OF[kind], nn.SyncBatchNorm)):
            return None, f"a {type(norm).__name__} does not fit a {kind.__name__}"
        if widths(layer)[1] != len(norm.get_buffer("running_mean")):
            return None, f"it does not have the {widths(layer)[1]} channels of {into!r}"
        if kind is nn.Linear and not self._takes_matrices(path):
            return None, _MAYBE_NO_MATRIX
        return into, ""

    def _takes_matrices(self, path: str) -> bool:
        """Return whether a normalization sees ``[N, C]``: by the model's code, or by the data."""
        if self._graph.takes_matrices(path):
            return True
        if self._watched is None:
            self._watched = Graph(watch(self._model, self._context, self._batches))
        return self._watched.takes_matrices(path)

    def _fold_all(self, pairs: Mapping[str, str]) -> Mapping[str, Change]:
        """Fold all at once; if the model is not the same then, one after the other."""
        changes: dict[str, Change] = {}
        undos: list[Undo] = []
        for norm, layer in pairs.items():
            changes[norm], undo = self._fold(norm, layer)
            undos += [undo] if undo is not None else []
        if not undos or (trouble := self._trouble()) is None:
            return changes
        for undo in reversed(undos):
            undo()
        for norm, layer in pairs.items():
            changes[norm], undo = self._fold(norm, layer)
            if undo is not None and (trouble := self._trouble()) is not None:
                undo()
                changes[norm] = _refused(norm, trouble)
        return changes

    def _fold(self, path: str, layer_path: str) -> tuple[Change, Undo | None]:
        """Fold one and return what takes it back, or None where it was left alone."""
        model = self._model
        norm, layer = model.get_submodule(path), model.get_submodule(layer_path)
        had_bias = layer.bias is not None
        back = rescaling_of(norm).apply(layer)
        if isinstance(back, str):
            return _refused(path, f"of {layer_path!r}: {back}"), None
        identity = edits.remove(model, norm)

        def undo() -> None:
            edits.put(model, identity, norm)
            back()

        text = f"{path} is folded into {layer_path}"
        return Change(path, text, True, _edits(path, layer_path, not had_bias)), undo

    def _trouble(self) -> str | None:
        """Return what is no longer as it was in the model, or None and take note of its graph."""
        if self._graph.traced:
            graph = trace(self._model)
            if graph.reason is not None:
                return f"without it, {graph.reason}"
            self._graph = graph
        if self._before:
            try:
                after = outputs_of(self._model, self._context, self._batches)
            except Exception as error:  # the model's code may ask for what an Identity has not
                return f"without it, the model fails on the data ({error})"
            if not agree(self._before, after):
                return "folding it changes the model's outputs on the data"
        return None


def _edits(norm: str, layer: str, bare: bool) -> tuple[Edit, ...]:
    """Return how folding changes the structure; a layer that is bare gets a bias."""
    bias = (Edit(edits.BIAS, layer),) if bare else ()
    return (*bias, Edit(edits.IDENTITY, norm))


def _up_to_data(path: str, when: str) -> Change:
    return Change(path, f"{path} is to be folded {when}")


def _refused(path: str, reason: str) -> Change:
    return Change(path, f"{path} is not folded: {reason}", done=False)
