"""Laws of roundings, of single weights and of blocks."""

from collections.abc import Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mono_quant.base import (
    AnyStatistic,
    BlockCall,
    BlockRounding,
    BlockWeight,
    FittedBlock,
    Grid,
    Rounding,
    Scheme,
    Statistic,
    Statistics,
)
from mono_quant.numerics.granularity import PerGroup
from mono_quant.numerics.metrics import sqnr_db
from mono_quant.numerics.values import Layout, QTensor
from mono_quant.observers import MinMax
from mono_quant.quantizer import Quantizer
from mono_quant.schemes import Affine, Codebook, FloatCast, Outliers
from mono_quant.testing.law import DoesNotApply, Laws, Untouched, expect, same_bits
from mono_quant.testing.models import Perceptron, noise

_SCHEMES: tuple[Scheme, ...] = (
    Affine(8),
    Affine(4, False, PerGroup(16)),
    Affine(3),
    Affine(4, False, PerGroup(16), float_zero_point=True),
    Codebook.nf4(PerGroup(16)),
    FloatCast(),
)
_EIGHT_BITS = (Affine(8), Affine(8, False, float_zero_point=True))
_NEAR_DB = 20.0
"""What products with an 8-bit weight reach at least; to nearest they reach over 40."""


def _inputs() -> Tensor:
    return noise(200, 16, seed=1) @ noise(16, 16, seed=2)


def _gathered(needs: tuple[AnyStatistic, ...], x: Tensor) -> Statistics:
    return Statistics({one: one.observe(x) for one in needs if isinstance(one, Statistic)})


def _cases(rounding: Rounding) -> Iterator[tuple[Tensor, Grid, Statistics]]:
    """Yield a weight ``[1, 6, 16]`` with each grid that a rounding takes."""
    able = [scheme for scheme in _SCHEMES if rounding.refuse(scheme) is None]
    expect(bool(able), f"it refuses all of {', '.join(one.describe() for one in _SCHEMES)}")
    for scheme in able:
        statistics = _gathered(rounding.needs, _inputs())
        yield noise(1, 6, 16, seed=3) / 4, Grid(scheme, MinMax()), statistics


def codes_lie_on_the_grid(rounding: Rounding) -> None:
    """`round` returns codes of the weight's shape that the scheme can store and decode."""
    for weight, grid, statistics in _cases(rounding):
        q = rounding.round(weight, grid, statistics)
        expect_on_grid(q, weight, grid.scheme)


def expect_on_grid(q: QTensor, weight: Tensor, scheme: Scheme) -> None:
    """Raise `Broken` unless codes are those of a weight, within the width of a scheme."""
    words = scheme.describe()
    expect(isinstance(q, QTensor), f"{words}: a {type(q).__name__} came back, and no QTensor")
    expect(q.codes.shape == weight.shape, f"{words}: codes are {tuple(q.codes.shape)}")
    if scheme.code_bits is not None:
        low, high = scheme.code_min, scheme.code_min + 2**scheme.code_bits - 1
        inside = not q.codes.is_floating_point() and bool(
            ((q.codes >= low) & (q.codes <= high)).all()
        )
        expect(inside, f"{words}: codes are not integers from {low} to {high}")
    values = scheme.dequantize(q)
    expect(bool(torch.isfinite(values).all()), f"{words}: a value is not finite")


def products_stay_near(rounding: Rounding) -> None:
    """What an 8-bit weight makes of the inputs is at 20 dB or more: it is still that weight."""
    able = [scheme for scheme in _EIGHT_BITS if rounding.refuse(scheme) is None]
    if not able:
        raise DoesNotApply("it refuses 8 bits")
    x, weight = _inputs(), noise(1, 6, 16, seed=3) / 4
    for scheme in able:
        q = rounding.round(weight, Grid(scheme, MinMax()), _gathered(rounding.needs, x))
        found = sqnr_db(x @ weight[0].T, x @ scheme.dequantize(q)[0].T)
        expect(found >= _NEAR_DB, f"{scheme.describe()}: products are at {found:.1f} dB")


def rounding_changes_nothing_and_is_repeatable(rounding: Rounding) -> None:
    """The weight is read only, the codes have memory of their own, and are the same each time."""
    for weight, grid, statistics in _cases(rounding):
        given = Untouched(the_weight=weight)
        one, other = (rounding.round(weight, grid, statistics) for _ in range(2))
        given.expect()
        words = grid.scheme.describe()
        expect(same_bits(one.codes, other.codes), f"{words}: other codes the second time")
        shared = one.codes.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        expect(not shared, f"{words}: codes share the memory of the weight")


def refusals_are_words(rounding: Rounding) -> None:
    """`refuse` returns a reason or None for any scheme, and never raises."""
    for scheme in (*_SCHEMES, Outliers(Affine(4))):
        reason: object = rounding.refuse(scheme)
        expect(reason is None or isinstance(reason, str), f"refuse returns {reason!r}")


def it_says_what_it_needs(rounding: Rounding) -> None:
    """`needs` are statistics, `describe` is a line, `work_bytes` and `batches` are numbers."""
    for one in rounding.needs:
        expect(isinstance(one, Statistic), f"it needs {one!r}, which is no Statistic")
    words = rounding.describe()
    expect(bool(words) and "\n" not in words, f"describe returns {words!r}")
    expect(rounding.work_bytes((1, 8, 8)) >= 0, "work_bytes is negative")
    batches = rounding.batches if isinstance(rounding, BlockRounding) else None
    expect(batches is None or batches >= 0, "batches is negative")


def a_model_rounded_with_it_is_saved_and_loaded(rounding: Rounding) -> None:
    """A model is rounded on data, saved, loaded into a fresh one and gives the same bits."""
    model = Perceptron()
    quantizer = Quantizer().bits(4).rounding(rounding).only("*").fit(model.example())
    result = quantizer.apply(model, progress=False)
    expect(len(result.report.quantized) == 3, "not every layer was quantized")
    found = result.validate()
    expect(bool(found), str(found))


# --- of blocks ---------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class _Block:
    """A block and what is asked of a rounding for it."""

    module: nn.Module
    weights: Mapping[str, BlockWeight]
    calls: Sequence[BlockCall]
    free: Sequence[str] = ("0.bias", "2.bias")

    @classmethod
    def of(cls, rounding: BlockRounding) -> "_Block":
        """Return one with the statistics that a rounding needs."""
        block = Perceptron()
        grid = Grid(Affine(4, False, PerGroup(16)), MinMax())
        x, weights = block.example(), {}
        for place, layer in enumerate(block):
            if isinstance(layer, nn.Linear):
                layout = Layout.grouped(tuple(layer.weight.shape))
                stack = layout.to_stack(layer.weight.detach())
                statistics = _gathered(rounding.needs, x)
                weights[f"{place}.weight"] = BlockWeight(stack, layout, grid, statistics)
            with torch.no_grad():
                x = layer(x)
        inputs, outputs = block.example().chunk(2), x.chunk(2)
        calls = [BlockCall((x,), {}, [y]) for x, y in zip(inputs, outputs, strict=True)]
        return cls(block, weights, calls)

    def fitted(self, rounding: BlockRounding) -> FittedBlock:
        """Return what a rounding makes of it."""
        return rounding.fit(self.module, self.weights, self.calls, self.free)


def every_weight_of_a_block_is_fitted(rounding: BlockRounding) -> None:
    """`fit` returns each weight it was asked for, on its grid, and no other."""
    block = _Block.of(rounding)
    found, weights = block.fitted(rounding), block.weights
    expect(
        set(found.weights) == set(weights),
        f"{sorted(weights)} were asked for and {sorted(found.weights)} came back",
    )
    for name, q in found.weights.items():
        expect_on_grid(q, weights[name].stack, weights[name].grid.scheme)


def only_what_is_free_changes(rounding: BlockRounding) -> None:
    """The block stays as it is, and of its parameters only those named free get new values."""
    block = _Block.of(rounding)
    given = Untouched(
        the_block=dict(block.module.state_dict(keep_vars=True)),
        a_weight=[one.stack for one in block.weights.values()],
        the_inputs=[call.args for call in block.calls],
    )
    found = block.fitted(rounding)
    given.expect()
    taken = set(found.parameters) - set(block.free)
    expect(not taken, f"{', '.join(sorted(taken))} changed, which is not free")


def the_block_is_no_worse_than_to_nearest(rounding: BlockRounding) -> None:
    """On the calls that it was fitted on, a block errs no more than with each weight to nearest."""
    block = _Block.of(rounding)
    found, weights = block.fitted(rounding), block.weights
    nearest = {
        name: one.grid.scheme.quantize(one.stack, one.grid.qparams(one.stack))
        for name, one in weights.items()
    }
    errors = []
    for codes, parameters in ((found.weights, found.parameters), (nearest, {})):
        state = dict(parameters)
        for name, q in codes.items():
            values = weights[name].grid.scheme.dequantize(q)
            state[name] = weights[name].layout.to_native(values)
        with torch.no_grad():
            missed = [
                (functional_call(block.module, state, call.args) - call.targets[0]).square().sum()
                for call in block.calls
            ]
        errors.append(float(torch.stack(missed).sum()))
    expect(
        errors[0] <= errors[1] * (1 + 1e-5),
        f"its squared error is {errors[0] / errors[1]:.2f} times that of rounding to nearest",
    )


LAWS = Laws(
    Rounding,
    (
        codes_lie_on_the_grid,
        products_stay_near,
        rounding_changes_nothing_and_is_repeatable,
        refusals_are_words,
        it_says_what_it_needs,
        a_model_rounded_with_it_is_saved_and_loaded,
    ),
)
BLOCK_LAWS = Laws(
    BlockRounding,
    (
        every_weight_of_a_block_is_fitted,
        only_what_is_free_changes,
        the_block_is_no_worse_than_to_nearest,
    ),
)
