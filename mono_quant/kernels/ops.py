"""The few operators of torch that are not public, typed, and whether this machine has them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mono_quant.kernels.trial import refusal

SHORTEST_ROW = 32
"""Shorter rows gain nothing, and torch 2.13 gets products over rows of one value wrong."""

LONGEST_ROW = 1 << 15
"""Up to here no sum of products of two bytes leaves 32 bits, corrections included."""

INT8_COLUMNS = 64
"""What the rows of `int8_mm` are multiples of."""

_TRIAL = """
import torch
for rows in (1, 3, 17, 64):
    for length in (32, 1000):
        left = torch.randint(0, 256, (rows, length), dtype=torch.uint8)
        right = torch.randint(-128, 128, (96, length), dtype=torch.int8)
        left[0], right[0] = 255, -128
        found = torch._int_mm(left, right.t())
        assert torch.equal(found.double(), left.double() @ right.double().t())
"""
_INT4_TRIAL = """
import torch
aten = torch.ops.aten
count, length, group = 128, 512, 64
codes = torch.randint(0, 16, (count, length), dtype=torch.int32)
packed = aten._convert_weight_to_int4pack_for_cpu(codes, 1)
small = codes.to(torch.uint8)
low, high = small.reshape(-1, 2, half, length).transpose(2, 3).unbind(1)
assert torch.equal(packed.flatten(), (low | high << 4).flatten()), "another order"
pairs = torch.randint(-8, 9, (length // group, count, 2)).to(torch.bfloat16)
scale, offset = (part.t().double().repeat_interleave(group, 1) for part in pairs.unbind(-1))
weight = (codes.double() - 8) * scale + offset
for rows in (1, 2, 3, 4, 17, 64):
    x = torch.randint(-4, 5, (rows, length)).to(torch.bfloat16)
    found = aten._weight_int4pack_mm_for_cpu(x, packed, group, pairs)
    assert torch.equal(found, (x.double() @ weight.t()).to(torch.bfloat16))
"""
_FP16_TRIAL = """
import torch
quantized = torch.ops.quantized
patterns = torch.arange(1 << 16).to(torch.int16).view(torch.float16)
patterns = patterns[patterns.isfinite()]
for rows, length in ((1024, 62), (64, 992), (1, 63488)):
    weight = patterns.reshape(rows, length)
    packed = quantized.linear_prepack_fp16(weight.float(), None)
    found, _ = quantized.linear_unpack_fp16(packed)
    again = found.to(torch.float16)
    assert torch.equal(again.view(torch.int16), weight.view(torch.int16)), "other weights"
for rows, length in ((96, 512), (1, 513), (33, 1), (65, 1100)):
    weight = torch.randint(-64, 65, (rows, length)).float()
    packed = quantized.linear_prepack_fp16(weight / 8, None)
    for count in (0, 1, 2, 3, 17, 130):
        x = torch.randint(-4, 5, (count, length)).float()
        found = quantized.linear_dynamic_fp16(x, packed)
        assert found.dtype == torch.float32
        assert torch.equal(found.double(), x.double() @ weight.double().t() / 8)
    weight = torch.zeros(rows, length)
    weight[:, 0] = torch.arange(rows)
    packed = quantized.linear_prepack_fp16(weight, None)
    x = torch.full((2, length), 1 + 2.0**-20)  # more digits than halves have
    x[1, -1] = float("nan")
    found = quantized.linear_dynamic_fp16(x, packed)
    assert torch.equal(found[0], x[0, 0] * weight[:, 0])
    assert found[1].isnan().all()
"""
_FP16_SEQUENCE_TRIAL = """
import torch
quantized, aten = torch.ops.quantized, torch.ops.aten
torch.manual_seed(0)
for units, length in ((96, 40), (160, 513)):
    for kind, gates in (("LSTM", 4), ("GRU", 3)):
        layer = getattr(torch.nn, kind)(length, units, 2, bidirectional=True)
        layer.requires_grad_(False)
        cells, biases = [], []
        for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
            pair = []
            for name in ("ih", "hh"):
                weight = getattr(layer, f"weight_{name}_{suffix}")
                weight.copy_(weight.half())
                biases.append(torch.zeros(gates * units))
                pair.append(quantized.linear_prepack_fp16(weight, biases[-1]))
                biases[-1].copy_(getattr(layer, f"bias_{name}_{suffix}"))
            cells.append(quantized.make_quantized_cell_params_fp16(*pair))
        x = torch.randn(7, 3, length)
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, [7, 4, 1])
        states = [torch.randn(4, 3, units) for _ in range(2 if kind == "LSTM" else 1)]
        given = states if kind == "LSTM" else states[0]
        options = (True, 2, 0.0, False, True)
        more = {"dtype": torch.float16, "use_dynamic": True} if kind == "LSTM" else {}
        run = getattr(aten, f"quantized_{kind.lower()}")
        found = run.input(x, given, cells, *options, False, **more)
        output, last = layer(x, tuple(states) if kind == "LSTM" else given)
        expected = (output, *last) if kind == "LSTM" else (output, last)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() < 1e-4, f"{kind} is wrong"
        found = run.data(*packed[:2], given, cells, *options, **more)[0]
        output = layer(packed, tuple(states) if kind == "LSTM" else given)[0].data
        assert (found - output).abs().max() < 1e-4, f"{kind} of packed sequences is wrong"
"""


Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")


def untraced(function: Callable[Asked, Answer]) -> Callable[Asked, Answer]:
    """Let a function run while `torch.compile` makes a trace, which holds what it returned.

    What `torch.compiler.assume_constant_result` does, without seconds of imports.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch reads it
    return function


def int_mm(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right.T``, exact, as ``int32 [m, n]``.

    Args:
        left: ``uint8 [m, k]``, contiguous, k from `SHORTEST_ROW` to `LONGEST_ROW`. Signed bytes
            would do, and take twice as long for few rows.
        right: ``int8 [n, k]``.
    """
    return int_mm_columns(left, right.t())


def int_mm_columns(left: Tensor, columns: Tensor) -> Tensor:
    """Return `int_mm` for a right factor that is turned already, ``int8 [k, n]``."""
    return torch._int_mm(left, columns)


@untraced
def int_mm_refusal() -> str | None:
    """Return why `int_mm` cannot be used by this torch on this machine, or None."""
    return refusal("the integer product", _TRIAL)


def int8_mm(x: Tensor, codes: Tensor) -> Tensor:
    """Return ``x @ codes.T`` as ``bfloat16 [M, out]``, summed in float32.

    Args:
        x: ``bfloat16 [M, in]``. Float32 ones are computed one value at a time, and far slower.
        codes: ``int8 [out, in]``, `in` a multiple of `INT8_COLUMNS`. The operator reads beyond rows
            that are none, and may end the process.
    """
    ones = torch.ones(codes.shape[0], dtype=torch.bfloat16, device=codes.device)
    product: Tensor = torch.ops.aten._weight_int8pack_mm(x, codes, ones)
    return product


@untraced
def int8_mm_refusal() -> str | None:
    """Return why `int8_mm` cannot be used by this torch on this machine, or None."""
    return refusal("the 8-bit product in bfloat16", _INT8_TRIAL)


_INT8_TRIAL = """
import torch
for rows, length in ((96, 512), (1, 576), (33, 64), (7, 128)):
    weight = torch.randint(-128, 128, (rows, length), dtype=torch.int8)
    for count in (1, 2, 3, 17, 130):
        x = torch.randint(-8, 9, (count, length)).to(torch.bfloat16)
        found = torch.ops.aten._weight_int8pack_mm(x, weight, torch.ones(rows).to(x.dtype))
        exact = x.double() @ weight.double().t()
        assert found.dtype == torch.bfloat16
        assert ((found - exact).abs() <= 2.0**-8 * exact.abs()).all(), "a product is wrong"
"""


def int4_mm(x: Tensor, panels: Tensor, group: int, pairs: Tensor) -> Tensor:
    """Return ``x @ weight.T`` as ``bfloat16 [M, out]``, summed in float32.

    Args:
        x: ``bfloat16 [M, in]``. Others are computed one value at a time, a hundred times slower.
        panels: ``uint8 [panels, in, half]``, in the order that `int4_panel` tells.
        group: columns that share a scale: 32, 64, 128 or 256.
        pairs: ``bfloat16 [in / group, out, 2]``: scale and offset, see `Panels`.
    """
    _, length, _ = panels.shape
    packed = panels.view(pairs.shape[1], length // 2)
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, pairs)
    return product


@untraced
def int4_panel() -> int | str:
    """Return half the rows of a panel of `int4_mm`, or why it cannot be used on this machine."""
    return _int4_panel()


@cache
def _int4_panel() -> int | str:
    why: str | None = None
    for half in (32, 16):
        name = f"the 4-bit product in panels of {2 * half} rows"
        why = refusal(name, f"half = {half}\n{_INT4_TRIAL}")
        if why is None:
            return half
    return str(why)


_ENGINES = ("x86", "fbgemm")


def engine_refusal() -> str | None:
    """Return why torch as it is set does not pack weights by FBGEMM, or None."""
    engine = torch.backends.quantized.engine
    if engine in _ENGINES:
        return None
    return f"torch.backends.quantized.engine is {engine}, not {' or '.join(_ENGINES)}"


def fp16_refusal() -> str | None:
    """Return why `fp16_mm` cannot be used by this torch on this machine as it is set, or None."""
    return engine_refusal() or refusal("the product with packed float16 weights", _FP16_TRIAL)


def fp16_sequence_refusal() -> str | None:
    """Return why `fp16_sequence` cannot be used by this torch on this machine, or None."""
    return fp16_refusal() or refusal(
        "the recurrent layer of packed float16 weights", _FP16_SEQUENCE_TRIAL
    )


def fp16_pack(weight: Tensor, bias: Tensor | None = None) -> torch.ScriptObject:
    """Return a weight as `fp16_mm` reads it, which takes `fp16_packed_bytes`.

    Args:
        weight: ``float32 [out, in]``, all of whose values are finite ones of float16. Others are
            changed to the nearest, with no error.
        bias: ``float32 [out]`` that is added to each product; what it holds then, not now.
    """
    packed: torch.ScriptObject = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    return packed


def fp16_packed_bytes(rows: int, length: int) -> int:
    """Return the bytes that `fp16_pack` takes: panels of 32 rows and 512 columns, each whole.

    Without AVX-512 panels have 16 rows, and it may be less.
    """
    panels, columns = -(-rows // _FP16_ROWS), -(-length // _FP16_COLUMNS)
    return 2 * panels * _FP16_ROWS * columns * _FP16_COLUMNS


_FP16_ROWS, _FP16_COLUMNS = 32, 512


def fp16_unpack(packed: torch.ScriptObject) -> Tensor:
    """Return the weight that was packed, ``float32 [out, in]``, to the bit."""
    weight: Tensor = torch.ops.quantized.linear_unpack_fp16(packed)[0]
    return weight


def fp16_mm(x: Tensor, packed: torch.ScriptObject) -> Tensor:
    """Return ``x @ weight.T`` as ``float32 [M, out]``, summed in float32.

    Args:
        x: ``float32 [M, in]``.
        packed: by `fp16_pack`.
    """
    product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, packed)
    return product


def fp16_cell(inputs: torch.ScriptObject, hidden: torch.ScriptObject) -> torch.ScriptObject:
    """Return the weights that inputs and h meet, both by `fp16_pack`, as one direction's."""
    cell: torch.ScriptObject = torch.ops.quantized.make_quantized_cell_params_fp16(inputs, hidden)
    return cell


def fp16_sequence(
    mode: str,
    x: tuple[Tensor, ...],
    states: Sequence[Tensor],
    cells: list[torch.ScriptObject],
    options: tuple[object, ...],
) -> tuple[Tensor, ...]:
    """Return the output of a recurrent layer and its last states, in float32.

    Args:
        mode: "LSTM" or "GRU".
        x: what `torch.lstm` takes first: ``float32 [T, B, in]``, or the data and batch sizes of a
            packed sequence.
        states: ``float32 [layers * directions, B, units]`` each.
        cells: by `fp16_cell`, of each direction of each layer.
        options: what `torch.lstm` takes last, from whether there are biases on.
    """
    made: tuple[Tensor, ...]
    if mode == "GRU":
        made = torch.ops.aten.quantized_gru(*x, *states, cells, *options)
    else:
        made = torch.ops.aten.quantized_lstm(
            *x, list(states), cells, *options, dtype=torch.float16, use_dynamic=True
        )
    return made


def followed(*tensors: Tensor | None) -> bool:
    """Return whether somebody follows what is computed from `tensors`, rather than its values.

    Gradients, backward or forward, transforms of `torch.func`, tracing, fake tensors and other
    subclasses: machine code would break all of these, or be lost in silence.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return True
    if forward_ad._current_level >= 0:  # tangents leave no trace on the tensor's flags
        return True
    for tensor in tensors:  # a loop, since every layer waits for it at each call
        if tensor is not None and type(tensor) not in _PLAIN:
            return True
    return gradient_asked(*tensors)


@untraced
def is_exported() -> bool:
    """Return whether a trace that is made is one of `torch.export`, or torch cannot tell.

    Untraced, since torch up to 2.11 says within any trace that it is.
    """
    exporting = getattr(torch.compiler, "is_exporting", None)  # torch 2.6 has none
    return exporting is None or bool(exporting())


_PLAIN = (Tensor, torch.nn.Parameter)


def gradient_asked(*tensors: Tensor | None) -> bool:
    """Return whether gradients go backward through what is computed from `tensors`."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor.requires_grad for tensor in tensors if tensor is not None)


def unfollowed(make: Callable[[], Tensor]) -> Tensor:
    """Return what `make` does where nobody follows it: if need be, in a thread of its own.

    Operators on packed weights know no fake tensors and no traces: torch 2.13 dies of them.
    """
    if not followed():
        return make()
    with ThreadPoolExecutor(1) as aside:
        return aside.submit(make).result()
