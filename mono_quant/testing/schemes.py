"""Laws of grids."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from mono_quant.base import PackedTensor, RangeEstimator, Scheme
from mono_quant.errors import InputError
from mono_quant.numerics.blocks import (
    AT_ONCE,
    block_counts,
    block_range,
    block_sum,
    spread,
    to_blocks,
)
from mono_quant.numerics.granularity import Granularity, Shape
from mono_quant.numerics.values import Layout, QParams, QTensor
from mono_quant.observers import MSE, MinMax
from mono_quant.quantizer import Quantizer
from mono_quant.testing.law import (
    Broken,
    DoesNotApply,
    Laws,
    Untouched,
    expect,
    refused,
    same_bits,
)
from mono_quant.testing.models import fill, noise

_LENGTHS = (8, 16, 32, 64, 96, 128, 256, 512, 1024, 4096)
_TINY = torch.finfo(torch.float32).tiny
_NONE = torch.finfo(torch.float64).tiny
_MANY = 1 << 14
"""Values for which shorter ways are taken that a few are not worth."""


def stack_of(scheme: Scheme) -> Shape:
    """Return the shape of the smallest stack ``[2, 3, in]`` that a scheme takes.

    Raises:
        DoesNotApply: it takes none of those that were tried.
    """
    for length in _LENGTHS:
        if scheme.refuse((2, 3, length)) is None:
            return (2, 3, length)
    raise DoesNotApply(f"it refuses rows of {', '.join(map(str, _LENGTHS))} values")


def stacks_for(scheme: Scheme) -> Iterator[Tensor]:
    """Yield float32 stacks of ordinary sizes: normal, heavy of tail, of one sign, alike, zero."""
    shape = stack_of(scheme)
    normal = noise(*shape)
    yield normal
    yield normal**3
    yield normal.abs() * 1e-3
    yield 100 - normal
    yield torch.full(shape, -0.3)
    yield torch.zeros(shape)


# --- of any stack ------------------------------------------------------------------------------


def codes_lie_within_their_width(scheme: Scheme, x: Tensor) -> None:
    """Codes are shaped as the stack, and integers of `code_bits` bits from `code_min` on."""
    codes = _quantized(scheme, x).codes
    expect(codes.shape == x.shape, f"codes are {tuple(codes.shape)} for a stack {tuple(x.shape)}")
    if scheme.code_bits is None:
        expect(codes.is_floating_point(), f"codes without a width are floats, not {codes.dtype}")
        return
    expect(
        codes.dtype in (torch.uint8, torch.int8),
        f"codes are {codes.dtype}, where uint8 or int8 was expected",
    )
    low, high = int(codes.min()), int(codes.max())
    most = scheme.code_min + 2**scheme.code_bits - 1
    expect(
        scheme.code_min <= low and high <= most,
        f"codes go from {low} to {high}, beyond {scheme.code_min} to {most}",
    )


def there_is_one_scale_for_each_block(scheme: Scheme, x: Tensor) -> None:
    """Scales and zero points are shaped as the granularity cuts the stack, and finite."""
    qparams, shape = scheme.choose_qparams(x, MinMax()), tuple(x.shape)
    block = scheme.granularity.block_size(shape)
    expect(qparams.block_size == block, f"the block is {qparams.block_size}, not {block}")
    counts = block_counts(shape, block)
    for name, tensor in (("scale", qparams.scale), ("zero point", qparams.zero_point)):
        if tensor is not None:
            found = tuple(tensor.shape)
            expect(found == counts, f"the {name} is {found}, where {counts} was expected")
            finite = torch.isfinite(tensor.to(torch.float32)).all()
            expect(bool(finite), f"a {name} is not finite")


def no_other_grid_point_is_nearer(scheme: Scheme, x: Tensor) -> None:
    """Every value becomes the nearest point of its grid, by trying all of them."""
    q = _quantized(scheme, x)
    exact = x.to(torch.float64)
    chosen = (scheme.dequantize(q).to(torch.float64) - exact).abs()
    for other in _other_codes(scheme, q):
        points = scheme.dequantize(replace(q, codes=other)).to(torch.float64)
        points = torch.where(torch.isfinite(points), points, math.inf)
        distance = (points - exact).abs()
        # where two points are all but equally near, float32 arithmetic decides
        room = 4e-7 * (exact.abs() + points.abs()) + 1e-44
        missed = (chosen > distance + room) & torch.isfinite(distance)
        if bool(missed.any()):
            value, point = float(exact[missed][0]), float(points[missed][0])
            got = float(scheme.dequantize(q).to(torch.float64)[missed][0])
            expect(False, f"{value:.6g} became {got:.6g}, and {point:.6g} is nearer")


def values_come_back_near(scheme: Scheme, x: Tensor) -> None:
    """No value is off by two thirds of the largest in its block: ranges are covered."""
    found = scheme.fake_quantize(x, scheme.choose_qparams(x, MinMax()))
    block = scheme.granularity.block_size(tuple(x.shape))
    low, high = block_range(x, block)
    largest = torch.maximum(low.abs(), high.abs()).clamp(min=_TINY)  # no scale is smaller
    error = to_blocks((found - x).abs(), block) / spread(largest)
    worst = float(error.max())
    expect(worst <= 2 / 3, f"a value is off by {worst:.3g} of the largest in its block")


def quantizing_again_changes_nothing(scheme: Scheme, x: Tensor) -> None:
    """What lies on the grid stays where it is."""
    qparams = scheme.choose_qparams(x, MinMax())
    once = scheme.fake_quantize(x, qparams)
    again = scheme.fake_quantize(once, qparams)
    moved = int((again != once).sum())
    expect(moved == 0, f"{moved} of {x.numel()} values moved")


def the_same_comes_out_each_time(scheme: Scheme, x: Tensor) -> None:
    """Parameters and codes are the same to the bit when they are computed again."""
    one, other = _quantized(scheme, x), _quantized(scheme, x)
    expect(same_bits(one.codes, other.codes), "codes differ")
    pairs = zip(_parts(one.qparams).items(), _parts(other.qparams).values(), strict=True)
    for (name, left), right in pairs:
        expect(same_bits(left, right), f"{name} differs")


def nothing_handed_in_is_changed(scheme: Scheme, x: Tensor) -> None:
    """Stacks, ranges, parameters and codes are read only."""
    block = scheme.granularity.block_size(tuple(x.shape))
    low, high = block_range(x, block)
    given = Untouched(the_stack=x, the_range=(low, high))
    for observer in _observers():
        scheme.choose_qparams(x, observer)
    scheme.calculate_qparams(low, high, block_size=block)
    qparams = scheme.choose_qparams(x, MinMax())
    given.expect()
    parameters = Untouched(the_parameters=_parts(qparams))
    q = scheme.quantize(x, qparams)
    given.expect()
    codes = Untouched(the_codes=q.codes)
    scheme.dequantize(q)
    codes.expect()
    parameters.expect()


def packing_loses_nothing(scheme: Scheme, x: Tensor) -> None:
    """Codes, scales, zero points and the rest come back from dense bytes to the bit."""
    q = _quantized(scheme, x)
    packed = _packed(scheme, q)
    back = packed.unpack()
    expect(same_bits(back.codes, q.codes), "codes come back otherwise")
    given, found = _parts(q.qparams), _parts(back.qparams)
    expect(set(given) == set(found), f"{sorted(given)} were packed, {sorted(found)} came back")
    for name, tensor in given.items():
        expect(same_bits(found[name], tensor), f"{name} comes back otherwise")
    values = scheme.dequantize(q)
    expect(values.dtype == torch.float32, f"dequantize returns {values.dtype}, not float32")
    native = packed.dequantize()
    expect(same_bits(native.reshape(x.shape), values), "the weight comes back otherwise")
    reason = scheme.refuse_parts(packed.tensors, tuple(x.shape))
    expect(reason is None, f"refuse_parts refuses what it has packed: {reason}")
    codes = packed.tensors["codes"].clone()
    consumed = PackedTensor.pack(q, scheme, packed.layout, torch.float32, consume=True)
    expect(same_bits(consumed.tensors["codes"], codes), "codes packed in place are others")


def rows_are_decoded_alone(scheme: Scheme, x: Tensor) -> None:
    """Where it `decodes_rows`, some rows alone have the values that they have in the whole."""
    q = _quantized(scheme, x)
    if not scheme.decodes_rows:
        raise DoesNotApply("it does not say decodes_rows")
    packed, values = _packed(scheme, q), scheme.dequantize(q)
    if not q.qparams.by_rows and _parts(q.qparams):
        raise DoesNotApply("rows share a scale")
    for rows in (slice(0, 1), slice(1, 3)):
        part = scheme.dequantize(packed.part(rows))
        expect(same_bits(part, values[:, rows].contiguous()), f"rows {rows} decode otherwise")


def rows_are_quantized_as_in_the_whole(scheme: Scheme, x: Tensor) -> None:
    """Where it has a `quantize_rows` of its own, the codes are those of `quantize`."""
    if type(scheme).quantize_rows is Scheme.quantize_rows:
        raise DoesNotApply("it does not override quantize_rows")
    stack = x.repeat(1, 1 + AT_ONCE // x.numel(), 1)  # more rows than it takes at once
    qparams = _quantized(scheme, stack).qparams
    if not qparams.by_rows:
        raise DoesNotApply("rows share a scale")
    found = scheme.quantize_rows(stack, qparams)
    whole = scheme.quantize(stack, qparams).codes
    expect(same_bits(found.codes, whole), "codes of many rows are others than those of the whole")


def columns_are_quantized_as_in_the_whole(scheme: Scheme, x: Tensor) -> None:
    """Where it has a `by_column` of its own, columns in any order get the codes of the whole."""
    if type(scheme).by_column is Scheme.by_column:
        raise DoesNotApply("it does not override by_column")
    q = _quantized(scheme, x)
    values, last = scheme.dequantize(q), x.shape[2] - 1
    for order in (torch.arange(last + 1), torch.arange(last, -1, -1)):
        on_grid = scheme.by_column(q.qparams, order.expand(len(x), -1))
        for place, column in enumerate(order.tolist()):
            codes, found = on_grid(x[:, :, column], place)
            alike = same_bits(codes, q.codes[:, :, column].contiguous())
            expect(alike, f"column {column} has other codes")
            alike = torch.equal(found, values[:, :, column])  # zeros may have any sign
            expect(alike, f"column {column} has other values")


ON_ANY_STACK: tuple[Callable[[Scheme, Tensor], None], ...] = (
    codes_lie_within_their_width,
    there_is_one_scale_for_each_block,
    no_other_grid_point_is_nearer,
    values_come_back_near,
    quantizing_again_changes_nothing,
    the_same_comes_out_each_time,
    nothing_handed_in_is_changed,
    packing_loses_nothing,
    rows_are_decoded_alone,
    rows_are_quantized_as_in_the_whole,
    columns_are_quantized_as_in_the_whole,
)
"""Laws that hold of every scheme on every finite float32 stack that it takes."""


def on_any_stack(law: Callable[[Scheme, Tensor], None]) -> Callable[[Scheme], None]:
    """Return the law about stacks of all sorts."""

    def checked(scheme: Scheme) -> None:
        for x in stacks_for(scheme):
            law(scheme, x)

    checked.__name__, checked.__doc__ = law.__name__, law.__doc__
    return checked


def check_stack(scheme: Scheme, x: Tensor) -> None:
    """Check every law that holds of any stack on one: for stacks that hypothesis draws.

    Args:
        scheme: what is checked.
        x: a finite float32 stack ``[G, out, in]`` that it takes.

    Raises:
        Broken: a law does not hold; its name comes first.
    """
    for law in ON_ANY_STACK:
        try:
            law(scheme, x)
        except DoesNotApply:
            continue
        except Broken as broken:
            raise Broken(f"{law.__name__}: {broken}") from broken


# --- of certain stacks -------------------------------------------------------------------------


def zeros_come_back_as_zeros(scheme: Scheme) -> None:
    """A stack of zeros is zero on every grid."""
    x = torch.zeros(stack_of(scheme))
    for observer in _observers():
        found = scheme.fake_quantize(x, scheme.choose_qparams(x, observer))
        expect(not bool(found.any()), f"they come back as up to {float(found.abs().max()):.3g}")


def extreme_values_stay_finite_or_are_refused(scheme: Scheme) -> None:
    """From denormals to 1e38, what is not an `InputError` comes back finite."""
    x = noise(*stack_of(scheme)).clamp(-3, 3)
    for magnitude in (1e-44, 1e-40, 1e-38, 1e-30, 1e-7, 2e7, 1e30, 1e38):
        try:
            qparams = scheme.choose_qparams(x * magnitude, MinMax())
        except InputError:
            continue
        found = scheme.fake_quantize(x * magnitude, qparams)
        finite = bool(torch.isfinite(found).all())
        expect(finite, f"values near {magnitude:g} come back as NaN or infinity")


def approximations_leave_about_the_same_error(scheme: Scheme) -> None:
    """An `approximate` of its own leaves each block about the squared error of the exact values."""
    if type(scheme).approximate is Scheme.approximate:
        raise DoesNotApply("it does not override approximate")
    matrices, rows, length = stack_of(scheme)
    shape = (matrices, rows * max(1, _MANY // (matrices * rows * length)), length)
    if (refusal := scheme.refuse(shape)) is not None:
        raise DoesNotApply(f"it refuses {shape}: {refusal}")
    for x in (noise(*shape), noise(*shape) ** 3 * 1e-3, noise(*shape).clamp(-3, 3) * 1e-38):
        qparams = scheme.choose_qparams(x, MinMax())
        found, exact = (
            block_sum((values - x).to(torch.float64).square_(), qparams.block_size)
            for values in (scheme.approximate(x, qparams), scheme.fake_quantize(x, qparams))
        )
        worst = float(((found - exact).abs() / exact.clamp(min=_NONE)).max())
        expect(worst <= 0.1, f"the error of a block is off by {worst:.3g} of what it is")


def what_is_not_finite_is_refused(scheme: Scheme) -> None:
    """NaN and infinity, in a stack or a range, are an `InputError`."""
    x = noise(*stack_of(scheme))
    for bad in (math.nan, math.inf, -math.inf):
        holding = x.clone()
        holding[1, 2, 3] = bad
        for observer in _observers():
            with refused(InputError, f"a stack with {bad}"):
                scheme.choose_qparams(holding, observer)
        end = torch.full((1,), bad)
        with refused(InputError, f"a range up to {bad}"):
            scheme.calculate_qparams(end, end, block_size=(1,))


def empty_stacks_stay_empty(scheme: Scheme) -> None:
    """A stack without rows or columns is quantized to an empty one, unless `refuse` says no."""
    length = stack_of(scheme)[-1]
    for shape in ((1, 0, length), (1, 4, 0), (1, 0, 0)):
        if scheme.refuse(shape) is None:
            x = torch.zeros(shape)
            packed = _packed(scheme, _quantized(scheme, x))
            expect(packed.dequantize().shape == shape[1:], f"{shape} comes back otherwise")


def bytes_are_those_foretold(scheme: Scheme) -> None:
    """`nbytes` is what the packed tensors take, which plans go by."""
    length = stack_of(scheme)[-1]
    for shape in ((2, 3, length), (1, 5, 2 * length), (1, 1, length)):
        if scheme.refuse(shape) is None:
            packed = _packed(scheme, _quantized(scheme, noise(*shape)))
            foretold, found = scheme.nbytes(shape), packed.nbytes
            # of columns that are kept apart, how many there are is found in the weight
            right = found <= foretold if scheme.columns_apart else found == foretold
            expect(right, f"nbytes says {foretold} for {shape}, and it takes {found} bytes")


def the_dtype_of_the_weight_is_remembered(scheme: Scheme) -> None:
    """A `QTensor` knows the dtype that came in, and is decoded to it."""
    x = noise(*stack_of(scheme))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        q = scheme.quantize(x.to(dtype), scheme.choose_qparams(x, MinMax()))
        expect(q.dtype == dtype, f"a {dtype} became a QTensor of {q.dtype}")
        native = _packed(scheme, q).dequantize()
        expect(native.dtype == dtype, f"a weight of {dtype} is decoded to {native.dtype}")


def the_device_is_kept(scheme: Scheme) -> None:
    """What is quantized on an accelerator stays there."""
    if not torch.accelerator.is_available():
        raise DoesNotApply("there is no accelerator here")
    x = noise(*stack_of(scheme)).to(torch.accelerator.current_accelerator())
    q = _quantized(scheme, x)
    for name, tensor in {"codes": q.codes, **_parts(q.qparams)}.items():
        expect(tensor.device == x.device, f"{name} is on {tensor.device}")
    expect(scheme.dequantize(q).device == x.device, "values are elsewhere")


def it_says_what_it_is(scheme: Scheme) -> None:
    """`describe` is a line of words, `remark` one or None, and `refuse` never raises."""
    words = scheme.describe()
    expect(bool(words) and "\n" not in words, f"describe returns {words!r}")
    remark = scheme.remark(_quantized(scheme, noise(*stack_of(scheme))))
    expect(remark is None or bool(remark), f"remark returns {remark!r}")
    for shape in ((1, 1, 1), (1, 0, 7), (3, 1, 10), (1, 4, 0)):
        reason: object = scheme.refuse(shape)
        expect(reason is None or isinstance(reason, str), f"refuse returns {reason!r}")


def a_model_with_it_is_saved_and_loaded(scheme: Scheme) -> None:
    """A model is quantized, saved, loaded into a fresh one and gives the same bits."""
    length = stack_of(scheme)[-1]
    model = nn.Sequential(nn.Linear(length, 8))
    fill(model)
    result = Quantizer().scheme(scheme).only("*").apply(model, progress=False)
    expect(bool(result.report.quantized), "no weight was quantized")
    found = result.validate(noise(3, length, seed=1))
    expect(bool(found), str(found))


def granularities_cut_without_remainder(granularity: Granularity) -> None:
    """Blocks have a size for each dimension, and tile what is not refused."""
    for shape in ((1, 4, 8), (2, 3, 64), (1, 5, 96), (1, 128, 256), (3, 1, 7)):
        if granularity.refuse(shape) is not None:
            with refused(InputError, f"a stack {shape}"):
                granularity.block_size(shape)
            continue
        block = granularity.block_size(shape)
        expect(len(block) == len(shape), f"the block of {shape} is {block}")
        tiled = all(size % part == 0 for size, part in zip(shape, block, strict=True))
        expect(tiled, f"blocks of {block} do not tile {shape}")


def _observers() -> tuple[RangeEstimator, ...]:
    return (MinMax(), MSE(steps=3))


def _quantized(scheme: Scheme, x: Tensor) -> QTensor:
    return scheme.quantize(x, scheme.choose_qparams(x, MinMax()))


def _packed(scheme: Scheme, q: QTensor) -> PackedTensor:
    groups, rows, length = q.shape
    layout = Layout.grouped((groups * rows, length), groups)
    return PackedTensor.pack(q, scheme, layout, q.dtype)


def _parts(qparams: QParams) -> dict[str, Tensor]:
    named = {"scale": qparams.scale, "zero_point": qparams.zero_point, **qparams.extra}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _other_codes(scheme: Scheme, q: QTensor) -> Iterator[Tensor]:
    """Yield codes for all values: each that there is, or the neighbours of floats."""
    if scheme.code_bits is not None:
        for code in range(scheme.code_min, scheme.code_min + 2**scheme.code_bits):
            yield torch.full_like(q.codes, code)
        return
    if q.codes.dtype.itemsize != 2:
        raise DoesNotApply(f"the neighbours of {q.codes.dtype} are not known here")
    patterns = q.codes.view(torch.int16)
    for step in (-1, 1):
        yield (patterns + step).view(q.codes.dtype)


LAWS = Laws(
    Scheme,
    (
        *map(on_any_stack, ON_ANY_STACK),
        zeros_come_back_as_zeros,
        extreme_values_stay_finite_or_are_refused,
        approximations_leave_about_the_same_error,
        what_is_not_finite_is_refused,
        empty_stacks_stay_empty,
        bytes_are_those_foretold,
        the_dtype_of_the_weight_is_remembered,
        the_device_is_kept,
        it_says_what_it_is,
        a_model_with_it_is_saved_and_loaded,
    ),
)
GRANULARITY_LAWS = Laws(Granularity, (granularities_cut_without_remainder,))
