"""Where a Linear layer's time goes, and how far each setting is from what the machine can do."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor, nn

from mono_quant import QuantizedLayer
from mono_quant.base import Activation
from mono_quant.kernels import fbgemm, onednn
from mono_quant.kernels.digits import digits_of_inputs, grids_of_few, one_grid
from mono_quant.kernels.ops import int_mm
from mono_quant.modules import kernels_run
from tests.benchmarks.kernels import BATCHES, REPEATS, SETTINGS, SIZE
from tests.benchmarks.measure import least_seconds, one_thread, print_table

_COLD = 256e6  # bytes of weights that take turns, so that each comes from memory
_HOT = 1024  # rows and columns of factors that stay in a core's cache
_TURNS = 9
_MEASURED = [title for title in SETTINGS if "INT3" not in title]
_INTEGERS = [title for title in _MEASURED if title.startswith("INT8") and "float" not in title]


@attrs.frozen
class Machine:
    """What one thread reaches at best.

    Attributes:
        read: bytes a second from memory.
        floats: multiplications and additions of float32 a second.
        integers: those of bytes, summed in 32 bits.
    """

    read: float
    floats: float
    integers: float

    def seconds(self, title: str, batch: int, nbytes: float) -> float:
        """Return what the weights' bytes or the arithmetic take at least, the longer of both."""
        integer = title.startswith("INT8") or "dynamic" in title
        places = 3 if title.startswith("INT8") and "float" in title else 1  # digits of an input
        peak = self.integers / places if integer else self.floats
        return max(nbytes / self.read, 2 * batch * SIZE * SIZE / peak)


def main() -> None:
    """Print the machine's limits, each setting's share of them, and the parts of integer ones."""
    with torch.no_grad(), one_thread():
        limits = _machine()
        print(
            f"One thread: {limits.read / 1e9:.1f} GB/s read from memory, "
            f"{limits.floats / 1e9:.0f} GFLOP/s of float32, "
            f"{limits.integers / 1e9:.0f} GOP/s of bytes.\n"
        )
        print(f"Linear of {SIZE} x {SIZE}, weights from memory, least processor time by turns.")
        print("limit: what bytes of weights or arithmetic allow, over the float32 layer.\n")
        print_table(
            ("setting", "rows", "kernel", "over float32", "limit", "share of it"), _shares(limits)
        )
        print("What the integer ones take, as shares of a call: inputs put on their grid, the bare")
        print(
            "product, and the rest: scales, zero points, bias, and the way through the layer. The"
        )
        print(
            "product of fbgemm puts inputs on their grids itself, so theirs is to find the grids.\n"
        )
        print_table(("setting", "rows", "inputs", "product", "rest"), _parts())


def _machine() -> Machine:
    weights = [torch.randn(SIZE, SIZE) for _ in range(_copies(4 * SIZE * SIZE))]
    row, turn = torch.randn(SIZE), cycle(weights)
    hot = torch.randn(_HOT, _HOT)
    codes = torch.randint(-128, 128, (_HOT, _HOT), dtype=torch.int8)
    left = codes.view(torch.uint8)
    calls: list[Callable[[], object]] = [
        lambda: torch.mv(next(turn), row),
        lambda: next(turn).sum(),
        lambda: torch.mm(hot, hot),
    ]
    if onednn.refuse_linear() is None:  # else `int_mm` takes one value at a time
        packed, scale = onednn.pack_linear(codes), torch.ones(_HOT)
        calls.append(lambda: int_mm(left, codes))
        calls.append(lambda: onednn.linear(left, (1.0, 0, 255), packed, scale, None, None))
    if fbgemm.refuse() is None:
        panels = fbgemm.pack(codes, torch.ones(_HOT), None)
        calls.append(lambda: fbgemm.linear(hot, 1.0, 64, panels, 127))
    for call in calls:
        call()
    product, total, floats, *integers = least_seconds(calls, _TURNS)
    operations = 2 * _HOT**3
    return Machine(
        4 * SIZE * SIZE / min(product, total), operations / floats, operations / min(integers)
    )


def _made(title: str, source: nn.Linear) -> QuantizedLayer:
    quantizer = SETTINGS[title]
    fitted = quantizer.fit(torch.randn(64, SIZE)) if "static" in title else quantizer
    layer = fitted.apply(source, progress=False).model
    assert isinstance(layer, QuantizedLayer)
    return layer


def _shares(limits: Machine) -> Iterator[tuple[str, ...]]:
    source = nn.Linear(SIZE, SIZE)
    floats = cycle([copy.deepcopy(source) for _ in range(_copies(4 * SIZE * SIZE))])
    for title in _MEASURED:
        layer = _made(title, source)
        nbytes = sum(buffer.nbytes for buffer in layer.buffers())
        layers = [copy.deepcopy(layer) for _ in range(_copies(nbytes))]
        for batch in BATCHES:
            x = torch.randn(batch, SIZE)
            with kernels_run() as ran:
                for one in layers:
                    one(x)
            kernel = next(iter(ran.values()))
            calls = [partial(_run, turn, x) for turn in (cycle(layers), floats)]
            taken, base = least_seconds(calls, REPEATS[batch])
            limit = limits.seconds(title, batch, nbytes)
            yield (
                title,
                str(batch),
                kernel,
                f"{base / taken:.2f}",
                f"{base / limit:.1f}",
                f"{limit / taken:.0%}",
            )


def _parts() -> Iterator[tuple[str, ...]]:
    source = nn.Linear(SIZE, SIZE)
    for title in _INTEGERS:
        layer = _made(title, source)
        layers = [copy.deepcopy(layer) for _ in range(_copies(SIZE * SIZE))]
        activation = layer.activations()["weight"]
        stored = [one.packed_weights()["weight"].tensors["codes"][0].clone() for one in layers]
        products = _products(stored, (1 << (activation.scheme.code_bits or 8)) - 1)
        for batch in BATCHES:
            x = torch.randn(batch, SIZE)
            with kernels_run() as ran:
                for one in layers:
                    one(x)
            (kernel,) = set(ran.values())
            product, weights, rounds = products[kernel]
            digits = digits_of_inputs(x, activation)
            assert digits is not None  # of finite values
            calls: list[Callable[[], object]] = [
                partial(_run, cycle(layers), x),
                partial(_grids if rounds else _inputs, x, activation),
                partial(_product, product, x if rounds else digits.digits, cycle(weights)),
            ]
            for call in calls:
                call()
            whole, inputs, bare = least_seconds(calls, REPEATS[batch])
            rest = max(0.0, whole - inputs - bare)
            shares = (f"{part / whole:.0%}" for part in (inputs, bare, rest))
            yield (title, str(batch), *shares)


_NO_SCALE = torch.ones(SIZE)


class _Bare(NamedTuple):
    """The bare operator of a kernel.

    Attributes:
        product: of inputs and a weight.
        weights: as it takes them.
        rounds: whether it takes inputs as they are.
    """

    product: Callable[[Tensor, Any], Tensor]
    weights: Sequence[object]
    rounds: bool


def _products(stored: Sequence[Tensor], top: int) -> Mapping[str, _Bare]:
    """Return the bare operators of kernels for 8-bit weights, by the kernel's name.

    Args:
        stored: the weights.
        top: the largest code of inputs.
    """
    bare = {"integer": _Bare(int_mm, stored, rounds=False)}
    if not onednn.refuse_linear():
        packed = [onednn.pack_linear(codes) for codes in stored]
        bare["onednn"] = _Bare(_packed, packed, rounds=False)
    if not fbgemm.refuse():
        panels = [fbgemm.pack(codes, _NO_SCALE, None) for codes in stored]
        bare["fbgemm"] = _Bare(partial(_panels, top), panels, rounds=True)
    return bare


def _packed(codes: Tensor, weight: Tensor) -> Tensor:
    return onednn.linear(codes, (1.0, 0, 255), weight, _NO_SCALE, None, None)


def _panels(top: int, x: Tensor, weight: torch.ScriptObject) -> Tensor:
    return fbgemm.linear(x, 1.0, (top + 1) // 2, weight, top)


def _product(
    product: Callable[[Tensor, Any], Tensor], x: Tensor, weights: Iterator[object]
) -> Tensor:
    return product(x, next(weights))


def _inputs(x: Tensor, activation: Activation) -> object:
    return digits_of_inputs(x, activation)


def _grids(x: Tensor, activation: Activation) -> object:
    one = one_grid(x, activation)
    if one is not None:
        return one
    few = grids_of_few(x, activation)
    return activation.qparams(x) if few is None else few


def _run(layers: Iterator[nn.Module], x: Tensor) -> object:
    return next(layers)(x)


def _copies(nbytes: float) -> int:
    return max(2, round(_COLD / nbytes))


if __name__ == "__main__":
    main()
