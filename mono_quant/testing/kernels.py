"""Laws of kernels, against the operation in float64 on decoded weights."""

from collections.abc import Iterator, Sequence

import attrs
import torch

from mono_quant.base import (
    Activation,
    ArrangingKernel,
    Kernel,
    KernelSpec,
    PackedTensor,
    Scheme,
)
from mono_quant.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from mono_quant.numerics.values import Layout
from mono_quant.observers import MinMax
from mono_quant.operations import MatrixProduct
from mono_quant.schemes import Affine, Codebook, FloatCast, Outliers
from mono_quant.testing.law import DoesNotApply, Laws, Untouched, expect, same_bits
from mono_quant.testing.models import noise

_CPU = torch.device("cpu")
_NEAR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""How far a product may lie from the exact one, of the largest that the sums could be."""

_LAYOUT = Layout.grouped((128, 1024))
"""Machine code declines smaller ones."""

_DYNAMIC = Activation(Affine(8, False, PerToken(), torch.float32))
_STATIC = Activation.calibrated(
    Affine(8, False, PerTensor(), torch.float32), MinMax(), MinMax().observe(noise(64, 1024))
)


@attrs.frozen(eq=False)
class KernelCase:
    """A kernel, and what to ask of it.

    Attributes:
        kernel: what is checked.
        specs: what it is asked to do, of matrix products; by default all sorts of grids.
        room: how far a product in float32 may lie from the exact one, of the largest that its sums
            could be. A kernel that rounds inputs or scales to half precision needs more.
    """

    kernel: Kernel
    specs: Sequence[KernelSpec] = ()
    room: float = _NEAR[torch.float32]

    def __repr__(self) -> str:
        """Return the kernel's name."""
        return f"kernel {self.kernel.name!r}"

    def asked(self) -> Iterator[KernelSpec]:
        """Yield what it is asked."""
        if self.specs:
            yield from self.specs
            return
        schemes: tuple[Scheme, ...] = (
            Affine(8),
            Affine(8, False),
            Affine(4, False, PerGroup(32)),
            Affine(4, True, PerGroup(32)),
            Affine(3, False, PerChannel()),
            FloatCast(),
            Codebook.nf4(PerGroup(32)),
            Outliers(Affine(8), 2),
        )
        for scheme in schemes:
            for activation in (None, _DYNAMIC, _STATIC):
                yield KernelSpec(MatrixProduct(), scheme, _LAYOUT, activation)

    def supported(self) -> Iterator[tuple[KernelSpec, torch.dtype]]:
        """Yield what it is asked and can do on the CPU, and for which inputs.

        Raises:
            DoesNotApply: that is nothing.
        """
        reasons = {
            (spec, dtype): self.kernel.supports(spec, _CPU, dtype)
            for spec in self.asked()
            for dtype in _NEAR
        }
        able = [key for key, reason in reasons.items() if reason is None]
        if not able:
            last = list(reasons.values())[-1]
            raise DoesNotApply(f"it declines all that was asked of it on the CPU: {last}")
        yield from able

    def room_of(self, dtype: torch.dtype) -> float:
        """Return how far a product in some dtype may lie from the exact one."""
        return max(self.room, _NEAR[dtype])


def it_says_what_it_supports(case: KernelCase) -> None:
    """It has a name, and `supports` returns a reason or None for whatever it is asked."""
    expect(bool(case.kernel.name), "it has no name")
    for spec in case.asked():
        for dtype in (*_NEAR, torch.float64):
            reason: object = case.kernel.supports(spec, _CPU, dtype)
            expect(reason is None or isinstance(reason, str), f"supports returns {reason!r}")


def products_are_those_of_the_decoded_weight(case: KernelCase) -> None:
    """Its products are those in float64, within what sums in the dtype of the inputs allow."""
    for spec, dtype in case.supported():
        weight = _weight(spec)
        bias = noise(spec.layout.stack[1], seed=4).to(dtype)
        decoded = weight.dequantize(torch.float32).double()
        for rows in (1, 3, 33):
            x = noise(rows, spec.layout.stack[2], seed=rows).to(dtype)
            with torch.no_grad():
                found = case.kernel(spec, x, weight, bias)
            seen = x if spec.activation is None else spec.activation.fake_quantize(x)
            expected = seen.double() @ decoded.T + bias.double()
            most = float((seen.double().abs() @ decoded.abs().T + bias.double().abs()).max())
            here = f"{spec.scheme.describe()}, {dtype}, {rows} rows"
            shape = tuple(expected.shape)
            expect(tuple(found.shape) == shape, f"{here}: {tuple(found.shape)}, not {shape}")
            expect(found.dtype == dtype, f"{here}: {found.dtype} comes out")
            missed = float((found.double() - expected).abs().max()) / most
            expect(missed <= case.room_of(dtype), f"{here}: off by {missed:.2g} of the largest sum")


def it_changes_nothing_and_is_repeatable(case: KernelCase) -> None:
    """Inputs, weight and bias are read only, and the same product comes out again."""
    for spec, dtype in case.supported():
        weight = _weight(spec)
        bias = noise(spec.layout.stack[1], seed=4).to(dtype)
        x = noise(3, spec.layout.stack[2], seed=3).to(dtype)
        given = Untouched(the_input=x, the_weight=weight.tensors, the_bias=bias)
        with torch.no_grad():
            one, other = (case.kernel(spec, x, weight, bias) for _ in range(2))
        given.expect()
        here = spec.scheme.describe()
        expect(same_bits(one, other), f"{here}: another product the second time")
        shared = one.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        expect(not shared, f"{here}: the product lies in the memory of the input")


def inputs_of_any_shape_are_rows(case: KernelCase) -> None:
    """Inputs of more dimensions, transposed, or without a row, are taken as rows."""
    for spec, dtype in case.supported():
        weight, length = _weight(spec), spec.layout.stack[2]
        flat = noise(6, length, seed=7).to(dtype)
        with torch.no_grad():
            expected = case.kernel(spec, flat, weight, None)
            deep = case.kernel(spec, flat.reshape(2, 3, length), weight, None)
            moved = case.kernel(spec, flat.t().contiguous().t(), weight, None)
            none = case.kernel(spec, flat[:0], weight, None)
        here = spec.scheme.describe()
        outputs = spec.layout.stack[1]
        shape = tuple(deep.shape)
        expect(shape == (2, 3, outputs), f"{here}: of (2, 3, {length}) comes {shape}")
        expect(none.shape == (0, outputs), f"{here}: of no row comes {tuple(none.shape)}")
        largest = float(expected.abs().max())
        for what, found in (("of three dimensions", deep.flatten(0, 1)), ("transposed", moved)):
            missed = float((found - expected).abs().max()) / largest
            room = case.room_of(dtype)
            expect(missed <= room, f"{here}: inputs {what} are off by {missed:.2g}")


def an_arrangement_gives_the_codes_back(case: KernelCase) -> None:
    """A kernel with an order of its own gives back the canonical codes, bit for bit."""
    kernel = case.kernel
    for spec, _ in case.supported():
        if isinstance(kernel, ArrangingKernel):
            weight = _weight(spec)
            arranged = kernel.arrange(spec, weight)
            same = same_bits(arranged.canonical(), weight.tensors["codes"])
            expect(same, f"{spec.scheme.describe()}: other codes come back")


def _weight(spec: KernelSpec) -> PackedTensor:
    """Return a weight whose rows differ in size."""
    stack = noise(*spec.layout.stack) * torch.logspace(-1, 1, spec.layout.stack[1])[:, None]
    qparams = spec.scheme.choose_qparams(stack, MinMax())
    q = spec.scheme.quantize(stack, qparams)
    return PackedTensor.pack(q, spec.scheme, spec.layout, torch.float32)


LAWS = Laws(
    KernelCase,
    (
        it_says_what_it_supports,
        products_are_those_of_the_decoded_weight,
        it_changes_nothing_and_is_repeatable,
        inputs_of_any_shape_are_rows,
        an_arrangement_gives_the_codes_back,
    ),
)
