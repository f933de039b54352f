"""How long a plan will take: foreseen from samples of its weights and data, measured here and now.

What is measured are pieces of the work, each as short as tells something: some rows of a weight of
each grid and rounding, and the model on a few samples of the first batch. The rest is counting: how
many weights of how many values there are, and how often the data goes through the model.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import cast

import attrs
import torch
from torch import Tensor, nn

from mono_quant.base import Activation, BlockRounding, Container, PackedTensor, Statistics
from mono_quant.calibration import CalibrationData, compare, count_samples, device_of
from mono_quant.checkpoint import calling, copy_structure
from mono_quant.configurable import Config
from mono_quant.errors import CalibrationError
from mono_quant.gathering import Gathered
from mono_quant.numerics.nested import each
from mono_quant.plan.accumulated import Accumulated
from mono_quant.plan.chosen import Chosen
from mono_quant.plan.inputs import InputUses
from mono_quant.plan.measure import LayerErrors, gather_for
from mono_quant.plan.request import Request, WeightPlan, by_layer
from mono_quant.plan.weight_error import WeightError
from mono_quant.settings import Recipe
from mono_quant.speed import timed
from mono_quant.text import format_seconds, joined

SAMPLE_VALUES = 1 << 18
"""Values of a weight that are rounded to see how long that takes."""
WIDEST = 1536
"""Columns of the widest weight that is sampled where time grows faster than the columns do."""
PATIENCE = 0.1
"""Seconds that one run of the model may take, if a sample of the data takes no longer."""
_AND_BACK = 3
"""How many runs forward one forward and back is."""
_LEARNED = 6
"""How often a step of learning puts each weight on its grid, or takes as long with it."""


@attrs.frozen
class TimeEstimate:
    """How long a plan will take on this machine, about.

    Loading the model and saving it are not in it.

    Attributes:
        rounding_seconds: to put the weights on their grids.
        data_seconds: to run the model on the data.
        samples: how many samples that is; 0 without data.
        left_out: what takes time too and is not in the figures.
    """

    rounding_seconds: float
    data_seconds: float
    samples: int
    left_out: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """All that is foreseen."""
        return self.rounding_seconds + self.data_seconds

    def to_dict(self) -> Config:
        """Return everything as JSON data."""
        return {"seconds": self.seconds, **attrs.asdict(self), "left_out": list(self.left_out)}

    def __str__(self) -> str:
        """Return it as a line, with what it is made of."""
        text = f"time: {format_seconds(self.seconds)}, an estimate from samples measured here"
        if self.seconds >= 1:
            text += f": {format_seconds(self.rounding_seconds)} for the weights"
            if self.samples:
                text += f" and {format_seconds(self.data_seconds)} to run {self.samples} samples"
        return f"{text}; not counted: {joined(self.left_out)}" if self.left_out else text


@torch.no_grad()
def foresee_time(
    model: nn.Module,
    weights: Sequence[WeightPlan],
    request: Request,
    containers: Sequence[Container],
    *,
    runs: int,
) -> TimeEstimate:
    """Return about how long quantizing takes, from samples that take about a second.

    Args:
        model: a float copy, whose layers' containers are adapted meanwhile.
        weights: their fates.
        request: what was asked for.
        containers: what must be adapted for layers to be called.
        runs: how often the data goes through the model, beyond calibrating and measuring.

    Raises:
        CalibrationError: the model failed on the data.
        InputError: a weight or the data cannot be used.
    """
    todo = [weight for weight in weights if weight.recipe is not None]
    own = [weight for weight in todo if weight.tied_to is None]
    seen = _Runs()
    if request.evidence is not None and todo:
        with torch.random.fork_rng(), calling(model, containers, by_layer(todo)):
            seen = _Runs.of(model, todo, request, runs)
    kinds: dict[Hashable, list[WeightPlan]] = {}
    for weight in sorted(own, key=lambda one: (one.layout.stack[2], -one.parameters)):
        kinds.setdefault(_kind(weight), []).append(weight)
    rounding, left_out = 0.0, _left_out(own, request)
    learns = request.data is not None and request.statistics is None
    for alike in kinds.values():
        sample = next((one for one in alike if _is_known(one, seen.gathered)), None)
        if sample is None:
            left_out.append(f"rounding {alike[0].key}, which a sample of the data did not reach")
            continue
        cost = _Cost.of(model, sample, seen.gathered)
        for weight in alike:
            rounding += cost.seconds(weight)
            if learns:
                rounding += _LEARNED * _steps(weight) * cost.on_grid * weight.parameters
    if learns:
        rounding += _AND_BACK * max(map(_steps, own), default=0) * seen.batch_seconds
    return TimeEstimate(rounding, seen.seconds, seen.samples, tuple(left_out))


@attrs.frozen(eq=False)
class _Runs:
    """What running the data through the model takes.

    Attributes:
        batch_seconds: of the float model on a batch.
        seconds: of all runs over all of the data.
        samples: of all data.
        gathered: what weights ask of the data, from a few samples.
    """

    batch_seconds: float = 0.0
    seconds: float = 0.0
    samples: int = 0
    gathered: Mapping[tuple[str, str], Gathered] = attrs.field(factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, todo: Sequence[WeightPlan], request: Request, runs: int
    ) -> "_Runs":
        """Run a float model on some samples of the first batches, plainly and while looking on."""
        twin = copy_structure(model)
        errors = LayerErrors(
            model, twin, _InputsAsPlanned(twin), Accumulated(twin, len(by_layer(todo)))
        )

        def look(some: CalibrationData) -> None:
            compare(errors.outputs(todo, some, None), errors.accumulated.outputs(some, None))

        evidence, gathered = request.evidence, dict[tuple[str, str], Gathered]()
        assert evidence is not None  # else nothing is run
        seen = given = _Some.of(model, evidence, look)
        device = device_of(model)
        measuring = _quickest(lambda: look(seen.data), device)
        seconds = seen.share * (measuring + runs * seen.seconds)
        if request.measured is not None and request.data is not None:
            given = _Some.of(model, request.data, partial(_run, model))
        if request.statistics is not None:
            gathered |= request.statistics.gathered()
        elif request.data is not None:
            calibrating = timed(
                lambda: gathered.update(gather_for(model, todo, given.data, None)), device
            )
            if any(cast("Recipe", weight.recipe).rounding.sequential for weight in todo):
                calibrating += 2 * given.seconds  # blocks that are quantized, and of the float one
            seconds += given.share * calibrating
        samples = seen.samples + (given.samples if given is not seen else 0)
        return cls(given.batch_seconds, seconds, samples, gathered)


@attrs.frozen(eq=False)
class _Some:
    """Some samples of the first batch, which stand for all of the data.

    Attributes:
        data: these.
        count: how many they are.
        size: how many the batch has.
        samples: how many the data has, about.
        seconds: of the float model on these.
    """

    data: CalibrationData
    count: int
    size: int
    samples: int
    seconds: float

    @property
    def share(self) -> float:
        """How many times as many there are in all."""
        return self.samples / self.count

    @property
    def batch_seconds(self) -> float:
        """Of the float model on the batch."""
        return self.size / self.count * self.seconds

    @classmethod
    def of(
        cls, model: nn.Module, data: CalibrationData, first_run: Callable[[CalibrationData], None]
    ) -> "_Some":
        """Take as many as tell something, after a first run, of which nothing is counted."""
        first = next(batch for batch in data.batches() if count_samples(batch))
        size, device = count_samples(first), device_of(model)
        least = 1
        try:
            first_run(_cut(data, first, least))
        except CalibrationError:  # a model need not take a part of a batch
            least = size
            first_run(_cut(data, first, least))
        some = _cut(data, first, least)
        seconds = timed(lambda: _run(model, some), device)
        several = min(size, max(least, int(PATIENCE / seconds)))
        if several > least:
            some = _cut(data, first, several)
            seconds = _quickest(lambda: _run(model, some), device)
        return cls(some, several, size, data.count(size), seconds)


def _run(model: nn.Module, data: CalibrationData) -> None:
    for _ in data.outputs(model):
        pass


@attrs.frozen(eq=False)
class _InputsAsPlanned(InputUses):
    """What is seen of inputs, of a float model that stands in for the quantized one."""

    def activation(self, weight: WeightPlan) -> Activation | None:
        """Return how the inputs of a weight are going to be quantized; ranges are found anew."""
        activations = cast("Recipe", weight.recipe).activations
        return Activation(activations.scheme) if activations.mode is not None else None


@attrs.frozen
class _Cost:
    """What rounding a weight of one kind takes.

    Attributes:
        first: seconds for a single row.
        per_value: seconds for each value, beyond that.
        on_grid: seconds for each value to be put on its grid once the range is known.
        columns: of the weight that was measured; 0 where they do not matter.
    """

    first: float
    per_value: float
    on_grid: float
    columns: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        weight: WeightPlan,
        gathered: Mapping[tuple[str, str], Gathered],
    ) -> "_Cost":
        """Round one row of a weight, and then several."""
        stack = weight.maker.weights(model.get_submodule(weight.path))[weight.name].stack()
        statistics = _rows(weight, gathered)
        matrices, rows, columns = stack.shape
        needy = _needs(weight)
        if not needy:  # else statistics are of all matrices
            matrices = min(matrices, max(1, SAMPLE_VALUES // (rows * columns or 1)))
        rows = min(rows, max(2, SAMPLE_VALUES // (matrices * columns or 1)))
        one, several = stack[: matrices if needy else 1, :1], stack[:matrices, :rows]
        _round(weight, one, statistics)  # what only a first call does is not counted
        if not needy:
            _round(weight, several, statistics)
        measure = timed if needy else _quickest
        first = measure(lambda: _round(weight, one, statistics), stack.device)
        more = measure(lambda: _round(weight, several, statistics), stack.device)
        beyond = several.numel() - one.numel()
        per_value = max(0.0, more - first) / beyond if beyond else 0.0
        on_grid = 0.0
        if _steps(weight):
            grid = cast("Recipe", weight.recipe).grid
            q = grid.scheme.quantize(several, grid.qparams(several))
            again = timed(
                lambda: grid.scheme.quantize(grid.scheme.dequantize(q), q.qparams), stack.device
            )
            on_grid = again / (several.numel() or 1)
        return cls(first, per_value, on_grid, columns if needy else 0)

    def seconds(self, weight: WeightPlan) -> float:
        """Return what rounding another weight of that kind takes."""
        if not self.columns:
            return self.first + self.per_value * weight.parameters
        columns = weight.layout.stack[2]
        rows = max(columns, WIDEST) / max(self.columns, WIDEST)
        # Up to the widest it is calls of operators, one for a column, and beyond it their products.
        first = rows**3 * min(columns, WIDEST) / min(self.columns, WIDEST)
        return first * self.first + rows * self.per_value * weight.parameters


def _round(weight: WeightPlan, stack: Tensor, statistics: Statistics) -> None:
    """Do to a stack what is done to a weight; nothing is kept."""
    recipe = cast("Recipe", weight.recipe)  # only weights with a recipe are sampled
    scheme, q = recipe.grid.scheme.rounded(stack, recipe.rounding, recipe.grid.observer, statistics)
    apart = q.qparams.extra.get(scheme.columns_apart) if scheme.columns_apart else None
    WeightError.of(stack, q, scheme, apart)
    PackedTensor.pack(q, scheme, weight.layout, stack.dtype, consume=True)


def _quickest(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the quicker of two calls: something else may have run meanwhile."""
    return min(timed(call, device), timed(call, device))


def _rows(weight: WeightPlan, gathered: Mapping[tuple[str, str], Gathered]) -> Statistics:
    """Return what is known of the rows of inputs that a weight meets."""
    return gathered.get((weight.path, weight.name), Gathered()).rows


def _is_known(weight: WeightPlan, gathered: Mapping[tuple[str, str], Gathered]) -> bool:
    """Return whether all is known that rounding a weight asks for."""
    needs = cast("Recipe", weight.recipe).rounding.needs
    return all(need in _rows(weight, gathered) for need in needs)


def _kind(weight: WeightPlan) -> Hashable:
    """Return what weights have in common that take as long for each of their values."""
    recipe = cast("Recipe", weight.recipe)
    columns = min(weight.layout.stack[2], WIDEST) if _needs(weight) else 0
    return recipe.grid.scheme, recipe.grid.observer, recipe.rounding, columns.bit_length()


def _needs(weight: WeightPlan) -> bool:
    """Return whether its rounding looks at inputs: time then grows faster than its columns."""
    return weight.recipe is not None and bool(weight.recipe.rounding.needs)


def _steps(weight: WeightPlan) -> int:
    """Return how often a weight is learned from a batch."""
    rounding = weight.recipe.rounding if weight.recipe is not None else None
    return (rounding.batches or 0) if isinstance(rounding, BlockRounding) else 0


def _cut(data: CalibrationData, batch: object, samples: int) -> CalibrationData:
    """Return the first samples of a batch, as data."""
    count = count_samples(batch)

    def cut(value: object) -> object:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == count:
            return value[:samples]
        return value

    return attrs.evolve(data, source=[each(batch, cut)], samples=samples)


def _left_out(todo: Sequence[WeightPlan], request: Request) -> list[str]:
    """Return what takes time that is not foreseen."""
    if request.data is None:
        return []
    chosen = Chosen.of(request, todo)
    found = [type(one).__name__ for one in (*chosen.transforms, *chosen.corrections)]
    kinds = dict.fromkeys(cast("Recipe", weight.recipe).rounding for weight in todo)
    for rounding in kinds:
        if isinstance(rounding, BlockRounding) and rounding.batches is None:
            found.append(f"what {type(rounding).__name__} learns")
    if request.on_damage == "keep":
        found.append("beginning again where a layer is destroyed")
    return found
