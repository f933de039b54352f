"""Laws of what looks at values: statistics, range estimators and observers."""

from collections.abc import Iterator, Sequence
from typing import cast

import attrs
import torch
from torch import Tensor

from mono_quant.base import AnyStatistic, Observer, RangeEstimator, Scheme, Statistic
from mono_quant.errors import InputError
from mono_quant.numerics.blocks import block_range
from mono_quant.numerics.granularity import PerChannel, PerGroup, PerTensor
from mono_quant.numerics.nested import tensors_in
from mono_quant.quantizer import Quantizer
from mono_quant.schemes import Affine, FloatCast
from mono_quant.testing.law import Broken, Laws, Untouched, expect, refused, same_bits
from mono_quant.testing.models import Perceptron, noise

_GRANULARITIES = (PerTensor(), PerChannel(), PerGroup(8))
_GRIDS: tuple[Scheme, ...] = (
    Affine(8, False, PerTensor(), torch.float32),
    Affine(8, True),
    Affine(3, False),
    FloatCast(torch.bfloat16),
)
_ROUNDS = 1e-5
"""By how much sums of floats may differ, as a share of the largest."""


def tensors_of(state: object) -> list[Tensor]:
    """Return what a state holds, as float64 tensors: of attrs classes, tuples, tensors, numbers.

    Raises:
        Broken: there is nothing in it that can be compared.
    """
    found = list(_tensors_of(state))
    if not found:
        raise Broken(f"a state is a {type(state).__name__} without a tensor or number to compare")
    return found


def _tensors_of(state: object) -> Iterator[Tensor]:
    if attrs.has(type(state)):
        fields = attrs.fields(cast("type[attrs.AttrsInstance]", type(state)))  # it is one
        for field in fields:
            if field.eq:  # what is left out of comparisons is what was computed from the rest
                yield from _tensors_of(getattr(state, field.name))
    elif isinstance(state, bool | int | float):
        yield torch.tensor(float(state), dtype=torch.float64)
    elif isinstance(state, tuple | list):
        for item in state:
            yield from _tensors_of(item)
    else:
        yield from (x.to(torch.float64) for x in tensors_in(state))


def fold(statistic: Statistic[object], pieces: Sequence[Tensor]) -> object:
    """Return the state of several tensors, merged one after the other."""
    first, *rest = map(statistic.observe, pieces)
    for state in rest:
        first = statistic.merge(first, state)
    return first


def pieces_of_inputs() -> Iterator[list[Tensor]]:
    """Yield lists of inputs ``[n, 8]``: of unlike length, size and sign, zeros among them."""
    yield [noise(5, 8), noise(3, 8, seed=1), noise(9, 8, seed=2)]
    yield [noise(4, 8).abs(), 1e3 * noise(4, 8, seed=1), 1e-3 * noise(4, 8, seed=2)]
    yield [torch.zeros(2, 8), noise(1, 8), -noise(6, 8, seed=1).abs()]


def _known(statistic: AnyStatistic) -> Statistic[object]:
    if not isinstance(statistic, Statistic):
        raise Broken("it is no Statistic: subclass that, AnyStatistic only types collections")
    return cast("Statistic[object]", statistic)  # its state is whatever `observe` returns


# --- statistics --------------------------------------------------------------------------------


def merging_is_associative(subject: AnyStatistic) -> None:
    """Which two neighbours are merged first makes no difference."""
    statistic = _known(subject)
    merge = statistic.merge
    for pieces in pieces_of_inputs():
        a, b, c = map(statistic.observe, pieces)
        _expect_same(merge(merge(a, b), c), merge(a, merge(b, c)), "(a b) c and a (b c)")


def where_order_is_free_no_cut_or_order_matters(subject: AnyStatistic) -> None:
    """If it is `order_free`, pieces in any order make the state of the whole."""
    statistic = _known(subject)
    if statistic.order_free:
        for pieces in pieces_of_inputs():
            whole = statistic.observe(torch.cat(pieces))
            _expect_same(fold(statistic, pieces), whole, "pieces and the whole")
            _expect_same(fold(statistic, pieces[::-1]), whole, "the other order and the whole")


def observing_and_merging_change_nothing(subject: AnyStatistic) -> None:
    """Inputs and states that are handed in are read only."""
    statistic = _known(subject)
    x, y = noise(6, 8), noise(4, 8, seed=1)
    given = Untouched(the_input=(x, y))
    left, right = statistic.observe(x), statistic.observe(y)
    given.expect()
    held = tensors_of(left), tensors_of(right)
    before = [[x.clone() for x in tensors] for tensors in held]
    statistic.merge(left, right)
    for state, tensors in zip((left, right), before, strict=True):
        pairs = zip(tensors_of(state), tensors, strict=True)
        expect(all(same_bits(x, y) for x, y in pairs), "a state was changed by merging it")


def a_state_does_not_grow_with_the_data(subject: AnyStatistic) -> None:
    """Twice as many batches of a kind take no more memory."""
    statistic = _known(subject)
    sizes = []
    for count in (16, 32):
        state = fold(statistic, [noise(40, 8, seed=seed) for seed in range(count)])
        sizes.append(sum(x.numel() for x in tensors_of(state)))
    # counts of values that are found by and by may become a few more
    expect(sizes[1] <= 1.5 * sizes[0], f"{sizes[0]} values after 16 batches, {sizes[1]} after 32")


def states_of_inputs_are_accepted(subject: AnyStatistic) -> None:
    """`check_state` takes what inputs make, merged or not, and changes nothing in it."""
    statistic = _known(subject)
    for pieces in pieces_of_inputs():
        for state in (statistic.observe(pieces[0]), fold(statistic, pieces)):
            before = [x.clone() for x in tensors_of(state)]
            for stack in (None, (1, 3, 8)):
                try:
                    statistic.check_state(state, stack)
                except InputError as error:
                    raise Broken(f"a state of inputs [n, 8] is refused: {error}") from error
            pairs = zip(tensors_of(state), before, strict=True)
            expect(all(same_bits(x, y) for x, y in pairs), "a state was changed by checking it")


# --- range estimators --------------------------------------------------------------------------


def a_weight_has_a_range_for_each_block(estimator: RangeEstimator) -> None:
    """`range_of` returns a low and a high end for each block, float32, low below high."""
    for scheme, x, block in _weights():
        low, high = estimator.range_of(x, scheme, block)
        shape = tuple(block_range(x, block)[0].shape)
        for end in (low, high):
            expect(
                tuple(end.shape) == shape and end.dtype == torch.float32,
                f"an end is {end.dtype} {tuple(end.shape)} where float32 {shape} was expected",
            )
        expect(bool((low <= high).all()), "a low end is above the high end of its block")


def a_range_lies_within_what_is_there_and_zero(estimator: RangeEstimator) -> None:
    """No end lies beyond the extremes of its block and zero: a grid gains nothing there."""
    for scheme, x, block in _weights():
        low, high = estimator.range_of(x, scheme, block)
        least, most = block_range(x, block)
        inside = (least.clamp(max=0) <= low) & (high <= most.clamp(min=0))
        expect(bool(inside.all()), f"a range passes the extremes of its block of {block}")


def empty_weights_have_ranges(estimator: RangeEstimator) -> None:
    """A weight without rows or columns is no error."""
    for shape in ((1, 0, 8), (1, 2, 0)):
        scheme = Affine(4, False, PerChannel())
        x, block = torch.empty(shape), scheme.granularity.block_size(shape)
        low, high = estimator.range_of(x, scheme, block)
        expected = block_range(x, block)[0].shape
        expect(low.shape == high.shape == expected, f"of {shape} come ends {tuple(low.shape)}")


def estimating_changes_nothing_and_is_repeatable(estimator: RangeEstimator) -> None:
    """The weight is read only, and asked again the answer is the same."""
    for scheme, x, block in _weights():
        given = Untouched(the_weight=x)
        one, other = (estimator.range_of(x, scheme, block) for _ in range(2))
        given.expect()
        expect(all(map(same_bits, one, other)), "another range was found the second time")


def grids_can_cover_the_range(estimator: RangeEstimator) -> None:
    """Every kind of grid makes finite values of the ranges, and a model with it validates."""
    for scheme in _GRIDS:
        x = noise(2, 4, 16) ** 3
        found = scheme.fake_quantize(x, scheme.choose_qparams(x, estimator))
        expect(bool(torch.isfinite(found).all()), f"{scheme.describe()}: a value is not finite")
    model = Perceptron()
    result = Quantizer().bits(4).only("*").observer(estimator).apply(model, progress=False)
    found_valid = result.validate(model.example())
    expect(bool(found_valid), str(found_valid))


# --- observers ---------------------------------------------------------------------------------


def the_range_lies_within_what_was_seen_and_zero(observer: Observer[object]) -> None:
    """`calculate_range` returns two float32 numbers between the extremes seen, and zero."""
    for pieces in pieces_of_inputs():
        seen = torch.cat([*map(torch.flatten, pieces), torch.zeros(1)])
        for scheme in _GRIDS:
            low, high = observer.calculate_range(fold(observer, pieces), scheme)
            for end in (low, high):
                expect(
                    end.shape == () and end.dtype == torch.float32,
                    f"an end is {end.dtype} {tuple(end.shape)}, where one float32 was expected",
                )
            expect(float(low) <= float(high), f"the range is {float(low):g} to {float(high):g}")
            inside = float(seen.min()) <= float(low) and float(high) <= float(seen.max())
            expect(
                inside,
                f"the range {float(low):g} to {float(high):g} passes what was seen, "
                f"{float(seen.min()):g} to {float(seen.max()):g}",
            )
            scheme.calculate_qparams(low, high, block_size=())


def values_that_are_all_alike_are_covered(observer: Observer[object]) -> None:
    """Of one value many times, the range holds that value."""
    for value in (0.0, 3.0, -1e-40, 1e38):
        x = torch.full((2, 9), value)
        alike = float(x[0, 0])
        for scheme in _GRIDS:
            low, high = observer.calculate_range(observer.observe(x), scheme)
            expect(
                float(low) <= alike <= float(high),
                f"of {alike:g} alone, the range is {float(low):g} to {float(high):g}",
            )


def what_is_not_finite_is_refused(observer: Observer[object]) -> None:
    """NaN and infinity in what is observed are an `InputError`, and so is a tensor of nothing."""
    for bad in ("nan", "inf", "-inf"):
        x = noise(4, 4)
        x[1, 1] = float(bad)
        with refused(InputError, f"a tensor with {bad}"):
            observer.observe(x)
    with refused(InputError, "an empty tensor"):
        observer.observe(torch.empty(0, 4))


def half_precision_is_computed_in_float32(observer: Observer[object]) -> None:
    """Halves give the range that the same values give as float32."""
    for dtype in (torch.float16, torch.bfloat16):
        x = (noise(40, 40) * 3).to(dtype)
        found = _ends(observer, x)
        expected = _ends(observer, x.to(torch.float32))
        expect(found == expected, f"of {dtype} comes {found}, of float32 {expected}")


def memory_order_makes_no_difference(observer: Observer[object]) -> None:
    """A transposed tensor is seen like its contiguous copy."""
    x = noise(31, 17)
    _expect_same(observer.observe(x.T), observer.observe(x.T.contiguous()), "x.T and its copy")


def inputs_of_a_model_are_calibrated_with_it(observer: Observer[object]) -> None:
    """A model whose inputs it calibrates is saved, loaded and gives the same bits."""
    model = Perceptron()
    data = [model.example(), 2 * model.example()]
    quantizer = Quantizer().activations("static").observer(activations=observer).fit(data)
    result = quantizer.only("*").apply(model, progress=False)
    static = [row for row in result.report.quantized if "static" in row.fate]
    expect(bool(static), "no input was quantized")
    found = result.validate()
    expect(bool(found), str(found))


def _weights() -> Iterator[tuple[Scheme, Tensor, tuple[int, ...]]]:
    for granularity in _GRANULARITIES:
        scheme = Affine(4, False, granularity, torch.float32)
        for x in (noise(1, 4, 64) ** 3, noise(2, 3, 400, seed=1), torch.zeros(1, 2, 16)):
            yield scheme, x, granularity.block_size(tuple(x.shape))


def _ends(observer: Observer[object], x: Tensor) -> list[float]:
    return [float(end) for end in observer.calculate_range(observer.observe(x), _GRIDS[0])]


def _expect_same(one: object, other: object, what: str) -> None:
    left, right = tensors_of(one), tensors_of(other)
    shapes = [[x.shape for x in state] for state in (left, right)]
    expect(shapes[0] == shapes[1], f"{what} have states of other shapes")
    for x, y in zip(left, right, strict=True):
        if x.numel():
            largest, missed = float(x.abs().max()), float((x - y).abs().max())
            within = missed <= _ROUNDS * largest
            expect(within, f"{what} differ by {missed:.3g} in a state up to {largest:.3g}")


STATISTIC_LAWS = Laws(
    AnyStatistic,
    (
        merging_is_associative,
        where_order_is_free_no_cut_or_order_matters,
        observing_and_merging_change_nothing,
        a_state_does_not_grow_with_the_data,
        states_of_inputs_are_accepted,
    ),
)
ESTIMATOR_LAWS = Laws(
    RangeEstimator,
    (
        a_weight_has_a_range_for_each_block,
        a_range_lies_within_what_is_there_and_zero,
        empty_weights_have_ranges,
        estimating_changes_nothing_and_is_repeatable,
        grids_can_cover_the_range,
    ),
)
OBSERVER_LAWS: Laws[Observer[object]] = Laws(
    Observer,
    (
        the_range_lies_within_what_was_seen_and_zero,
        values_that_are_all_alike_are_covered,
        what_is_not_finite_is_refused,
        half_precision_is_computed_in_float32,
        memory_order_makes_no_difference,
        inputs_of_a_model_are_calibrated_with_it,
    ),
)
