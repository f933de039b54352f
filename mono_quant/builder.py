"""The calls that say how a model is to be quantized: they name things and compute nothing."""

import math
from os import PathLike
from typing import ClassVar, Self

import attrs
import torch

from mono_quant.base import (
    Container,
    Correction,
    LayerQuantizer,
    Observer,
    RangeEstimator,
    Rounding,
    Scheme,
    Transform,
)
from mono_quant.calibration import DEFAULT_SAMPLES, CalibrationData, Forward
from mono_quant.configurable import Config, Kinds
from mono_quant.errors import ConfigurationError
from mono_quant.numerics.granularity import Granularity, PerGroup
from mono_quant.observers import create_observer
from mono_quant.plan.request import ACTIONS, OnlyIfFaster, Request
from mono_quant.plan.written import GRAPH, calls_of, config_of, request_from
from mono_quant.schemes import OutlierColumns
from mono_quant.selection import Selector, check_selector
from mono_quant.settings import Activations, Settings, granularity_of_inputs, granularity_of_weights
from mono_quant.speed import NO_DIFFERENCE
from mono_quant.statistics import CalibrationStatistics

FASTER_GRAPH = (
    "only_if_faster measures each layer by itself, on floats, and in a graph layers pass codes on: "
    "leave one of the two out; result.benchmark(example) measures a graph as a whole"
)
"""Why the two do not go together."""


@attrs.frozen(eq=False, repr=False)
class Builder:
    """What all quantizers are told, whatever they make of it.

    Immutable: every method returns a new builder of the same class. Its repr is the chain of calls
    that makes it.
    """

    _graph: ClassVar[bool] = False
    """Whether it makes a graph, which its configuration and its repr say."""

    _request: Request = attrs.field(factory=Request, alias="request")

    def bits(self, bits: int) -> Self:
        """Quantize weights to 2 to 8 bits, or cast them to half precision with 16.

        8 bits: symmetric, a scale for each channel. Fewer: asymmetric, a scale for each group of 64
        (each channel, where 64 does not divide a row); embeddings and layers under 512 values then
        stay float unless they are named. **Replaces**.
        """
        return self._settings(attrs.evolve(self._request.settings, bits=bits))

    def symmetric(self, symmetric: bool = True) -> Self:
        """Use a grid without a zero point. **Replaces** `asymmetric`."""
        return self._settings(attrs.evolve(self._request.settings, symmetric=symmetric))

    def asymmetric(self) -> Self:
        """Use a grid with a zero point. **Replaces** `symmetric`."""
        return self._settings(attrs.evolve(self._request.settings, symmetric=False))

    def float_zero_point(self, float_zero_point: bool = True) -> Self:
        """Use a grid whose zero points are floats in the dtype of its scales. **Replaces**.

        For `HQQ`, which moves them by fractions of a step. The grid is asymmetric at 8 bits too.
        """
        settings = attrs.evolve(self._request.settings, float_zero_point=float_zero_point)
        return self._settings(settings)

    def granularity(self, granularity: Granularity | str) -> Self:
        """Say which values share one scale: an object, or "tensor", "channel" or "group".

        **Replaces** an earlier granularity or group size.
        """
        return self._settings(
            attrs.evolve(self._request.settings, granularity=granularity_of_weights(granularity))
        )

    def group_size(self, size: int) -> Self:
        """Use a scale for each run of `size` values of a row.

        Layers whose rows `size` does not divide stay float, with that reason. **Replaces** an
        earlier group size.

        Raises:
            ConfigurationError: a granularity other than groups was asked for.
        """
        said = self._request.settings.granularity
        if said is not None and not isinstance(said, PerGroup):
            raise ConfigurationError(
                f"granularity({said!r}) was asked for, which has no groups; say one of the two"
            )
        return self._settings(attrs.evolve(self._request.settings, granularity=PerGroup(size)))

    def scale_dtype(self, dtype: torch.dtype) -> Self:
        """Store scales as float16 (the default), bfloat16 or float32. **Replaces**."""
        return self._settings(attrs.evolve(self._request.settings, scale_dtype=dtype))

    def outliers(self, columns: OutlierColumns | int | None = None) -> Self:
        """Keep the few columns of a weight that stand out in float16 (LLM.int8()). **Replaces**.

        The grid then need not reach for them. They are chosen by the weights, and by the inputs
        where `fit` gave data; their inputs stay float where those of other columns are quantized
        dynamically, which they then are at 8 bits unless you say otherwise.

        Args:
            columns: which stand out: by default those that are 6 times the median column, at most a
                sixteenth of all; a number means so many in each weight.

        Raises:
            ConfigurationError: a scheme was asked for before; say ``Outliers(scheme)`` there.
        """
        chosen = OutlierColumns() if columns is None else columns
        return self._settings(attrs.evolve(self._request.settings, outliers=chosen))

    def scheme(self, scheme: Scheme) -> Self:
        """Use this grid, in place of bits, symmetry, granularity, scale dtype and outliers.

        **Replaces**.

        Raises:
            ConfigurationError: one of those was asked for before.
        """
        return self._settings(attrs.evolve(self._request.settings, scheme=scheme))

    def quality(self, quality: str) -> Self:
        """Choose grid, ranges and rounding where nothing else is said of them. **Replaces**.

        Below 8 bits weights get a table of levels of their own (`FittedCodebook`) in groups of 32,
        or of the next smaller size from 8 on that divides their rows; say `group_size`, `scheme` or
        another part of a grid for that one instead, as for int4, whose products are faster. Ranges
        are those of least squared error. With data of `fit`, layers are calibrated block after
        block. `explain()` shows what that comes to.

        Args:
            quality: "fast" rounds to nearest and needs no data; "balanced" takes GPTQ. "best"
                refines it twice, turns the inputs of Linear layers first (`Rotate`), unless a
                rounding or another transform is said, and in the end learns scales, biases and
                norms by what the whole model returns (`TuneScales`), unless a rounding or a
                correction is said, the weights are more than 512 MB in float32, or the model is
                quantized in place.
        """
        return self._settings(attrs.evolve(self._request.settings, quality=quality))

    def observer(
        self,
        observer: RangeEstimator | str | None = None,
        *,
        weights: RangeEstimator | str | None = None,
        activations: RangeEstimator | str | None = None,
    ) -> Self:
        """Say how ranges are found: one for all, or one for weights and one for activations.

        Each is an observer, or its name as `create_observer` knows it. One for all is for weights
        only where it is no `Observer`: activations are seen in pieces. **Replaces** those given.
        """
        if (observer is None) == (weights is None and activations is None):
            raise ConfigurationError(
                "give one observer for all, or weights= and activations=: "
                "observer(MinMax()) or observer(weights=MSE())"
            )
        settings = self._request.settings
        for_all, for_weights, watcher = map(_observer, (observer, weights, activations))
        if isinstance(for_all, Observer):
            watcher = for_all
        return self._settings(
            attrs.evolve(
                settings,
                observer=for_all or for_weights or settings.observer,
                activation_observer=watcher or settings.activation_observer,
            )
        )

    def activations(
        self,
        mode: str | None,
        *,
        bits: int = 8,
        symmetric: bool = False,
        granularity: Granularity | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Self:
        """Say how the inputs of layers are quantized. **Replaces**.

        Without a word, 8-bit weights get static activations where there is data to calibrate on
        and dynamic ones where there is none; other widths, and a scheme of your own, get none.

        Args:
            mode: "dynamic" (each input has a range of its own), "static" (calibrated by `fit`) or
                None: they stay float.
            bits: 2 to 8.
            symmetric: use a grid without a zero point.
            granularity: "token" (a range for each row, the default of dynamic ones) or "tensor"
                (all that static ones can be).
            dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``, or the name of one, for a grid
                of 8-bit floats; None for integers.
        """
        chosen = granularity_of_inputs(granularity) if granularity is not None else None
        asked = Activations(mode, bits, symmetric, chosen, dtype)
        return self._settings(attrs.evolve(self._request.settings, activations=asked))

    def rounding(self, rounding: Rounding) -> Self:
        """Say how grid points are chosen. **Replaces**."""
        return self._settings(attrs.evolve(self._request.settings, rounding=rounding))

    def only(self, *selectors: Selector) -> Self:
        """Quantize nothing but these layers. **Adds**.

        Args:
            selectors: names (``*`` and ``?`` match, dots too), module types, modules of the model,
                or functions of ``(name, module)``. Each means all that lies below it as well.
        """
        return self._asking(
            attrs.evolve(self._request, only=(*self._request.only, *map(check_selector, selectors)))
        )

    def skip(self, *selectors: Selector) -> Self:
        """Leave these layers in float. **Adds**.

        Args:
            selectors: as for `only`.
        """
        return self._asking(
            attrs.evolve(self._request, skip=(*self._request.skip, *map(check_selector, selectors)))
        )

    def override(
        self,
        selector: Selector,
        *,
        bits: int | None = None,
        symmetric: bool | None = None,
        granularity: Granularity | str | None = None,
        group_size: int | None = None,
        scale_dtype: torch.dtype | None = None,
        float_zero_point: bool | None = None,
        outliers: OutlierColumns | int | None = None,
        scheme: Scheme | None = None,
        observer: RangeEstimator | str | None = None,
        rounding: Rounding | None = None,
        activations: Activations | str | None = None,
        activation_observer: RangeEstimator | str | None = None,
    ) -> Self:
        """Quantize some layers otherwise. **Adds**; where several apply, the last wins.

        What is not said here stays as it is for all. A layer named here is quantized even where low
        widths would leave it float by default.

        Args:
            selector: as for `only`.
            bits: as the method of that name, and so are all others.
            symmetric: see above.
            granularity: see above.
            group_size: see above.
            scale_dtype: see above.
            float_zero_point: see above.
            outliers: which columns, or how many.
            scheme: see above.
            observer: for the weights; an observer or its name.
            rounding: see above.
            activations: "dynamic", "static", "float" or an `Activations`.
            activation_observer: for the activations, in the same way.
        """
        if granularity is not None and group_size is not None:
            raise ConfigurationError("say granularity or group_size, not both")
        wanted = PerGroup(group_size) if group_size is not None else None
        settings = Settings(
            bits=bits,
            symmetric=symmetric,
            granularity=granularity_of_weights(granularity) if granularity is not None else wanted,
            scale_dtype=scale_dtype,
            float_zero_point=float_zero_point,
            outliers=outliers,
            scheme=scheme,
            observer=_observer(observer),
            rounding=rounding,
            activations=Activations(None if activations == "float" else activations)
            if isinstance(activations, str)
            else activations,
            activation_observer=_observer(activation_observer),
        )
        if settings == Settings():
            raise ConfigurationError(
                f"override({selector!r}) says nothing; add bits= or another, such as "
                'activations="float"'
            )
        entry = (check_selector(selector), settings)
        return self._asking(
            attrs.evolve(self._request, overrides=(*self._request.overrides, entry))
        )

    def layer(self, *layers: LayerQuantizer | Container) -> Self:
        """Teach it kinds of layer or container, asked before the built-in ones. **Adds**."""
        quantizers = tuple(layer for layer in layers if isinstance(layer, LayerQuantizer))
        containers = tuple(layer for layer in layers if isinstance(layer, Container))
        if len(quantizers) + len(containers) < len(layers):
            raise ConfigurationError("layer(...) takes instances of LayerQuantizer or Container")
        return self._asking(
            attrs.evolve(
                self._request,
                layers=(*self._request.layers, *quantizers),
                containers=(*self._request.containers, *containers),
            )
        )

    def fold(self, fold: bool = True) -> Self:
        """Fold batch normalizations into the layers before them, or leave them alone. **Replaces**.

        Without a word they are folded where any inputs are quantized. A folded one becomes an
        `nn.Identity`, in the result and in what its file is loaded into. So does an activation that
        its layer computes itself, where the layer's inputs are quantized; `fold(False)` refuses
        both.
        """
        if not isinstance(fold, bool):
            raise ConfigurationError(f"fold is True or False, not {fold!r}")
        return self._asking(attrs.evolve(self._request, fold=fold))

    def on_damage(self, action: str) -> Self:
        """Say what happens where quantizing destroys what a layer computes. **Replaces**.

        A layer is destroyed if what it returns for its float inputs is below 20 dB SQNR (10 dB for
        weights of fewer than 8 bits), measured on the data of `fit`; without data a weight is
        judged by an estimate, below 10 dB (see the report).

        Args:
            action: "warn" (the default) names the layer, what does it and the call that mends it;
                "keep" keeps the weights that do it at 16 bits, or leaves their inputs in float, and
                the report says so; "error" raises a `DamageError`.
        """
        if action not in ACTIONS:
            raise ConfigurationError(
                f"on_damage is {', '.join(map(repr, ACTIONS))}, not {action!r}"
            )
        return self._asking(attrs.evolve(self._request, on_damage=action))

    def only_if_faster(
        self, example: object, *, margin: float = NO_DIFFERENCE, forward: Forward | None = None
    ) -> Self:
        """Leave layers in float that are no faster quantized on this machine. **Replaces**.

        `apply` first calls the float model with the example and measures each layer by itself, on
        the inputs that it has there, float and quantized by turns. Layers that are alike, on inputs
        that are alike, are measured once. What the example does not reach stays float, layers that
        share a weight share the decision, and what you named is measured as everything else.

        The answer is that of this machine, its load and its number of threads; the configuration
        of the result names what was left in float, and makes the same model anywhere.

        Args:
            example: a batch such as the model will be called with, as `fit` takes them: how many
                rows it has decides much.
            margin: a layer stays float unless it is faster by more than this share.
            forward: calls the model with the example; by default as `fit` was told.

        Raises:
            InputError: the example cannot be one.
            ConfigurationError: the margin is below 0, or a graph is to be made.
        """
        if self._graph:
            raise ConfigurationError(FASTER_GRAPH)
        if not 0 <= margin < math.inf:
            raise ConfigurationError(
                f"margin is a share of 0 or more (0.05 for 5 %), not {margin!r}"
            )
        faster = OnlyIfFaster(CalibrationData.example(example, forward), margin)
        return self._asking(attrs.evolve(self._request, faster=faster))

    def transform(self, *transforms: Transform | Correction) -> Self:
        """Change the working copy: first the float model, then the quantized one. **Adds**.

        Args:
            transforms: a `Transform` changes the float model before it is quantized, after batch
                normalizations are folded; a `Correction` changes the quantized one. Each kind in
                the order given.
        """
        for transform in transforms:
            if not isinstance(transform, Transform | Correction):
                raise ConfigurationError(f"transform(...) takes instances, not {transform!r}")
        before = tuple(one for one in transforms if isinstance(one, Transform))
        after = tuple(one for one in transforms if isinstance(one, Correction))
        return self._asking(
            attrs.evolve(
                self._request,
                transforms=(*self._request.transforms, *before),
                corrections=(*self._request.corrections, *after),
            )
        )

    def fit(
        self, data: object, *, samples: int = DEFAULT_SAMPLES, forward: Forward | None = None
    ) -> Self:
        """Bind data to calibrate on; nothing runs yet. **Replaces**.

        The result is measured on it too, unless `measure_on` names other data for that.

        Args:
            data: a tensor or mapping (one batch), a list of batches, a Dataset or a DataLoader. Of
                a batch that is a tuple, what forward has no parameter for is taken for labels.
                Arrays of numpy count as tensors, except for a `forward` of yours.
            samples: go on until this many samples were seen.
            forward: calls the model with a batch, where it is called in a way of its own.

        Raises:
            InputError: the data is empty or can be gone through only once.
        """
        return self._asking(
            attrs.evolve(self._request, data=CalibrationData.bind(data, samples, forward))
        )

    def measure_on(
        self, data: object, *, samples: int = DEFAULT_SAMPLES, forward: Forward | None = None
    ) -> Self:
        """Bind the data that the report is measured on; nothing runs yet. **Replaces**.

        What was calibrated on flatters a rounding that learns from it, so data that was held back
        tells more; and where calibrating takes much, a few samples make a report that takes little.
        Damage is told by them too. Without `fit` a model is measured that needed no data.

        Args:
            data: as for `fit`.
            samples: go on until this many samples were seen.
            forward: calls the model with a batch, where it is called in a way of its own; as data
                to calibrate on is called by default.

        Raises:
            InputError: the data is empty or can be gone through only once.
        """
        bound = CalibrationData.bind(data, samples, forward)
        return self._asking(attrs.evolve(self._request, measured=bound))

    def statistics(self, statistics: CalibrationStatistics | str | PathLike[str]) -> Self:
        """Calibrate by what was gathered before, without a pass over the data. **Replaces**.

        They are of the inputs of float layers, so roundings that take block after block, as `GPTQ`
        does with data, see those; one that learns from the outputs of blocks rounds each weight
        apart, and the report says so. Data that is bound too is measured on.

        Args:
            statistics: what `Plan.calibrate` returned, or a file of it; one that names a class of
                your own is read with `CalibrationStatistics.load(path, kinds=...)`.

        Raises:
            CheckpointError: the file cannot be read.
        """
        if not isinstance(statistics, CalibrationStatistics):
            statistics = CalibrationStatistics.load(statistics)
        return self._asking(attrs.evolve(self._request, statistics=statistics))

    def to_config(self) -> Config:
        """Return everything but data and statistics as JSON data.

        Raises:
            ConfigurationError: a selector cannot be written down; use a name.
        """
        graph: Config = {GRAPH: True} if self._graph else {}
        return {**config_of(self._request, None), **graph}

    @classmethod
    def from_config(cls, config: Config, kinds: Kinds | None = None) -> Self:
        """Return the quantizer that wrote `config`.

        Args:
            config: what `to_config` returned, or a file's ``config``.
            kinds: classes of your own by their kind.

        Raises:
            ConfigurationError: it holds something unknown, or is that of the other quantizer.
            UnknownKindError: it names an unknown kind.
        """
        rest = dict(config)
        of_graph = rest.pop(GRAPH, False)
        if not isinstance(of_graph, bool):
            raise ConfigurationError(f"{GRAPH} is true or false, not {of_graph!r}")
        if of_graph and not cls._graph:
            raise ConfigurationError(
                "the configuration is that of a graph: GraphQuantizer.from_config(config), or take "
                f"{GRAPH!r} out of it for a model that keeps its class"
            )
        if cls._graph and not of_graph:
            raise ConfigurationError(
                "the configuration is not that of a graph: Quantizer.from_config(config).graph()"
            )
        return cls(request_from(rest, kinds))

    def __repr__(self) -> str:
        """Return the chain of calls; data, modules and functions are shown, not written down."""
        last = [f"{GRAPH}()"] if self._graph else []
        return ".".join(["Quantizer()", *calls_of(self._request), *last])

    def _settings(self, settings: Settings) -> Self:
        return self._asking(attrs.evolve(self._request, settings=settings))

    def _asking(self, request: Request) -> Self:
        return attrs.evolve(self, request=request)


def _observer(observer: RangeEstimator | str | None) -> RangeEstimator | None:
    return create_observer(observer) if isinstance(observer, str) else observer
