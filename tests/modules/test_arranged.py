"""Weights whose codes a kernel has put in an order of its own: nobody else notices."""

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor, nn

from mono_quant import QuantizedLayer, Quantizer, kernel_bytes, kernels, load_model
from mono_quant.base import Kernel
from mono_quant.kernels import fbgemm, onednn
from mono_quant.kernels.ops import fp16_refusal, int4_panel, int_mm_refusal
from mono_quant.kernels.panels import Panels
from mono_quant.kernels.store import STORE
from mono_quant.modules import QuantizedWeight, tie
from tests.helpers import noise, same_bits
from tests.kernels.cases import each

BITS4 = Quantizer().bits(4).only("*")
DYNAMIC = Quantizer().only("*")
LENGTH, COUNT = 512, 256


@attrs.frozen
class Kind:
    """An order of codes.

    Attributes:
        kernel: whose order it is.
        quantizer: what makes its weights.
        source: makes a float layer.
        shape: of inputs.
    """

    kernel: str
    quantizer: Quantizer
    source: Callable[[], nn.Module]
    shape: tuple[int, ...]


LINEAR, ROWS = partial(nn.Linear, LENGTH, COUNT), (3, LENGTH)
CONV, IMAGES = partial(nn.Conv2d, 16, 32, 3), (2, 16, 9, 12)
MATRICES = {
    "asymmetric": Kind("int4", BITS4, LINEAR, ROWS),
    "symmetric": Kind("int4", BITS4.symmetric(), LINEAR, ROWS),
    "fp16": Kind("fp16", Quantizer().bits(16).only("*"), LINEAR, ROWS),
}
KINDS = {
    **MATRICES,
    "taps": Kind("integer", DYNAMIC, CONV, IMAGES),
    "packed rows": Kind("onednn", DYNAMIC, LINEAR, ROWS),
    "packed rows, asymmetric": Kind("onednn", DYNAMIC.asymmetric(), LINEAR, ROWS),
    "rounded rows": Kind("fbgemm", DYNAMIC, LINEAR, ROWS),
    "rounded rows, asymmetric": Kind("fbgemm", DYNAMIC.asymmetric(), LINEAR, ROWS),
    "oneDNN": Kind("onednn", DYNAMIC, CONV, IMAGES),
    "oneDNN, asymmetric": Kind("onednn", DYNAMIC.asymmetric(), CONV, IMAGES),
}
in_panels = pytest.mark.parametrize("ran", ["asymmetric", "symmetric"], indirect=True)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def missing(kind: Kind) -> str | None:
    """Return why this machine cannot run a kernel, or None."""
    kernel = kind.kernel
    if kernel == "int4":
        return str(int4_panel()) if isinstance(int4_panel(), str) else None
    packed = onednn.refuse_linear if kind.source is LINEAR else onednn.refuse_conv
    refuse = {
        "fp16": fp16_refusal,
        "integer": int_mm_refusal,
        "onednn": packed,
        "fbgemm": fbgemm.refuse,
    }
    return refuse[kernel]()


@attrs.frozen(eq=False)
class Ran:
    """A layer that ran, and what it was before.

    Attributes:
        kind: of its order.
        layer: its codes are in another order.
        state: its state dict before.
        x: an input.
        y: what it made of it.
        plain: what the reference made of it before.
    """

    kind: Kind
    layer: QuantizedLayer
    state: dict[str, Tensor]
    x: Tensor
    y: Tensor
    plain: Tensor

    @property
    def holder(self) -> QuantizedWeight:
        return holder(self.layer)

    def again(self) -> nn.Module:
        """Return another layer, made in the same way."""
        return self.kind.quantizer.apply(self.kind.source(), progress=False).model


def holder(layer: nn.Module) -> QuantizedWeight:
    assert isinstance(layer, QuantizedLayer)
    found = layer.quantized_weights["weight"]
    assert isinstance(found, QuantizedWeight)
    return found


def moved(layer: nn.Module) -> bool:
    return holder(layer)._buffers["codes"] is None


@pytest.fixture(params=KINDS)
def ran(request: pytest.FixtureRequest) -> Iterator[Ran]:
    kind = KINDS[request.param]
    if why := missing(kind):
        pytest.skip(why)
    made = kind.quantizer.apply(kind.source(), progress=False).model
    assert isinstance(made, QuantizedLayer)
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    x = noise(*kind.shape)
    with kernels.use("reference"):
        plain = made(x)
    with kernels.use(kind.kernel):
        y = made(x)
        assert moved(made)
        assert not same_bits(y, plain)
        yield Ran(kind, made, state, x, y, plain)


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(same_bits(one[name], other[name]) for name in one)


def test_a_state_dict_is_canonical_and_shares_memory(ran: Ran) -> None:
    found = ran.layer.state_dict()
    assert same_state(found, ran.state)
    assert not moved(ran.layer)
    assert same_bits(ran.layer(ran.x), ran.y)
    assert moved(ran.layer)


def copied(layer: QuantizedLayer) -> QuantizedLayer:
    return copy.deepcopy(layer)


def pickled(layer: QuantizedLayer) -> QuantizedLayer:
    again: QuantizedLayer = pickle.loads(pickle.dumps(layer))
    return again


def saved(layer: QuantizedLayer) -> QuantizedLayer:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    again: QuantizedLayer = torch.load(file, weights_only=False)
    return again


@pytest.mark.parametrize("make", [copied, pickled, saved, copy.copy])
def test_copies_are_canonical_and_leave_the_original_alone(
    ran: Ran, make: Callable[[QuantizedLayer], QuantizedLayer]
) -> None:
    other = make(ran.layer)
    assert moved(ran.layer)
    if make is not copy.copy:  # which shares the module that holds the weight
        assert not moved(other)
    assert same_state(other.state_dict(), ran.state)
    assert same_bits(other(ran.x), ran.y)
    assert same_bits(ran.layer(ran.x), ran.y)


@in_panels
def test_no_pickle_holds_the_order(ran: Ran) -> None:
    held = ran.holder._held
    assert held is not None
    assert isinstance(held.arranged, Panels)
    stored = held.arranged.canonical()
    pickled_bytes = pickle.dumps(ran.layer)
    assert stored.numpy().tobytes() in pickled_bytes
    assert held.arranged.codes.numpy().tobytes() not in pickled_bytes


def test_other_codes_can_be_loaded(ran: Ran) -> None:
    source = ran.again()
    for assign in (False, True):
        ran.layer(ran.x)
        assert moved(ran.layer)
        ran.layer.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
        assert same_bits(ran.layer(ran.x), source(ran.x))
        ran.layer.load_state_dict(ran.state, assign=assign)
        assert same_bits(ran.layer(ran.x), ran.y)


def test_moving_to_another_dtype_and_back_changes_no_bit(ran: Ran) -> None:
    wide = ran.layer.double()
    assert not moved(wide)
    assert wide(ran.x.double()).dtype == torch.float64
    assert same_bits(wide.float()(ran.x), ran.y)
    assert same_state(ran.layer.state_dict(), ran.state)
    assert ran.layer.to("meta").state_dict()["quantized_weights.weight.codes"].is_meta


def test_packed_weights_and_floats_are_canonical(ran: Ran) -> None:
    packed = ran.layer.packed_weights()["weight"]
    assert same_bits(packed.tensors["codes"], ran.state["quantized_weights.weight.codes"])
    assert packed.tensors["codes"] is ran.layer.packed_weights()["weight"].tensors["codes"]
    ran.layer(ran.x)
    floats = ran.layer.dequantize()
    assert type(floats) is type(ran.kind.source())
    assert same_bits(floats.get_parameter("weight"), packed.dequantize())


def test_the_reference_reads_codes_and_leaves_them(ran: Ran) -> None:
    with kernels.use("reference"):
        assert same_bits(ran.layer(ran.x), ran.plain)
    with torch.enable_grad():
        x = ran.x.clone().requires_grad_()
        y = ran.layer(x)
        assert same_bits(y, ran.plain)
        y.sum().backward()
        assert x.grad is not None
    assert moved(ran.layer)


@in_panels
def test_a_kernel_of_canonical_codes_puts_them_back(ran: Ran) -> None:
    with kernels.use("blocks"):
        ran.layer(ran.x)
    assert not moved(ran.layer)
    with kernels.use("int4-blocks"):
        decoded = ran.layer(ran.x)
    assert moved(ran.layer)
    assert torch.allclose(decoded, ran.plain, rtol=1e-4, atol=1e-5)
    arranged = ran.holder._held
    assert same_bits(ran.layer(ran.x), ran.y)
    assert ran.holder._held is arranged, "both kernels read one order"


def test_a_file_is_the_same_before_and_after(ran: Ran, tmp_path: Path) -> None:
    result = ran.kind.quantizer.apply(nn.Sequential(ran.kind.source()), progress=False)
    for suffix in ("pt", "safetensors"):
        before, after = tmp_path / f"before.{suffix}", tmp_path / f"after.{suffix}"
        result.save(before)
        expected = result.model(ran.x)
        assert moved(result.model[0])
        result.save(after)
        again = load_model(after, nn.Sequential(ran.kind.source()))
        earlier = load_model(before, nn.Sequential(ran.kind.source()))
        assert same_state(again.state_dict(), earlier.state_dict())
        assert same_bits(again(ran.x), expected)


@in_panels
def test_compiled_layers_are_the_reference_whatever_the_order(ran: Ran) -> None:
    torch.compiler.reset()
    compiled = torch.compile(ran.layer, fullgraph=True, backend="eager")
    assert same_bits(compiled(ran.x), ran.plain)
    assert moved(ran.layer)
    ran.layer.state_dict()
    assert same_bits(compiled(ran.x), ran.plain)
    ran.layer(ran.x)
    assert same_bits(compiled(ran.x), ran.plain)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_holds_canonical_codes(ran: Ran, strict: bool) -> None:
    program = torch.export.export(ran.layer, (ran.x,), strict=strict)
    assert same_state(dict(program.state_dict), ran.state)
    assert not any(constant.numel() for constant in program.constants.values())
    assert same_bits(program.module()(ran.x), ran.plain)
    assert same_bits(ran.layer(ran.x), ran.y)


def test_threads_run_one_layer_while_others_read_it(ran: Ran) -> None:
    wrong: list[str] = []

    def runs() -> None:
        with torch.no_grad():
            for _ in range(30):
                if not same_bits(ran.layer(ran.x), ran.y):
                    wrong.append("product")

    def reads() -> None:
        for _ in range(30):
            if not same_state(ran.layer.state_dict(), ran.state):
                wrong.append("state")
            if not same_state(pickled(ran.layer).state_dict(), ran.state):
                wrong.append("pickle")

    threads = [threading.Thread(target=one) for one in (runs, runs, reads, reads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_that_processes_share_stays_shared(ran: Ran) -> None:
    ran.layer.share_memory()
    codes = ran.holder.packed.tensors["codes"]
    assert codes.is_shared()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert same_bits(ran.layer(ran.x), ran.plain)
    assert ran.holder.packed.tensors["codes"] is codes


def test_tensors_of_inference_mode_are_left_as_they_are(ran: Ran) -> None:
    with torch.inference_mode():
        made = copy.deepcopy(ran.layer)
        assert ran.layer.state_dict()  # codes are back
        assert holder(made).packed.tensors["codes"].is_inference()
        assert same_bits(made(ran.x), ran.plain)
        assert not moved(made)


def test_codes_come_back_as_ordinary_tensors_from_inference_mode(ran: Ran) -> None:
    with torch.inference_mode():
        assert same_bits(ran.layer(ran.x), ran.y)
        ran.layer.state_dict()
    codes = ran.holder.packed.tensors["codes"]
    assert not codes.is_inference()
    ran.layer.load_state_dict(ran.state)
    assert same_bits(ran.layer(ran.x), ran.y)


@in_panels
def test_writing_to_codes_and_scales_is_seen(ran: Ran) -> None:
    packed = ran.layer.packed_weights()["weight"]
    ran.layer(ran.x)
    packed.tensors["scale"].mul_(2)
    doubled = ran.layer(ran.x)
    fresh = copied(ran.layer)
    assert same_bits(doubled, fresh(ran.x))
    assert not same_bits(doubled, ran.y)
    packed.tensors["codes"].fill_(0x88)
    with kernels.use("reference"):
        assert same_bits(ran.layer(ran.x), copied(ran.layer)(ran.x))
    assert (ran.layer.packed_weights()["weight"].tensors["codes"] == 0x88).all()
    found = ran.layer(ran.x)
    assert same_bits(found, copied(ran.layer)(ran.x))
    assert not same_bits(found, doubled)


@pytest.mark.parametrize("settled", [False, True])
def test_functional_calls_use_the_tensors_they_are_given(ran: Ran, settled: bool) -> None:
    given = {name: tensor.clone() for name, tensor in ran.state.items()}
    given["quantized_weights.weight.codes"].fill_(0x38)
    other = copied(ran.layer)
    other.load_state_dict(given)
    with kernels.use("reference"):
        expected = other(ran.x)
    if settled:
        ran.layer.state_dict()
    found = torch.func.functional_call(ran.layer, given, (ran.x,))
    assert torch.allclose(found, expected, rtol=3e-2, atol=1e-2)
    assert same_state(ran.layer.state_dict(), ran.state)
    assert torch.allclose(ran.layer(ran.x), ran.plain, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("ran", MATRICES, indirect=True)
def test_a_weight_that_is_looked_up_by_rows_stays_canonical(ran: Ran) -> None:
    rows = nn.Embedding(COUNT, LENGTH)
    model = ran.kind.quantizer.apply(
        nn.ModuleDict({"rows": rows, "head": ran.layer.dequantize()}), progress=False
    ).model
    tie(model["rows"], "weight", model["head"], "weight")
    model["head"](ran.x)
    assert moved(model["head"])
    places = torch.tensor([3, 1, COUNT - 1])
    expected = holder(model["head"]).peek().dequantize()[places]
    assert same_bits(model["rows"](places), expected)
    model["head"](ran.x)
    assert not moved(model["head"])


@pytest.mark.parametrize("kind", MATRICES.values(), ids=MATRICES)
def test_tied_layers_share_one_arranged_weight(kind: Kind) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(LENGTH, LENGTH), nn.Linear(LENGTH, LENGTH)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.two(self.one(x))
            return found

    if why := missing(kind):
        pytest.skip(why)
    model = kind.quantizer.apply(Twins(), progress=False).model
    x = noise(2, LENGTH)
    with kernels.use(kind.kernel):
        y = model(x)
        assert moved(model.one)
        assert holder(model.one) is holder(model.two)
        again = copy.deepcopy(model)
        assert holder(again.one) is holder(again.two)
        assert same_bits(again(x), y)


@in_panels
def test_bytes_beside_the_file_are_counted(ran: Ran) -> None:
    groups = LENGTH // 64 * COUNT
    zeros = groups if "quantized_weights.weight.zero_point" in ran.state else 0
    assert kernel_bytes(nn.Sequential(ran.layer)) == 4 * groups + zeros
    ran.layer.state_dict()
    assert kernel_bytes(ran.layer) == 0
    eight = Quantizer().only("*").apply(nn.Linear(LENGTH, COUNT), progress=False).model
    with kernels.use("integer"):
        eight(ran.x)
    assert kernel_bytes(eight) == 2 * 4 * COUNT, "sums and scales"


@in_panels
def test_the_order_is_chosen_once_for_all_batches(
    ran: Ran, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speed = {"int4": 1.0, "int4-blocks": 3.0, "blocks": 2.0}

    def seconds(kernel: Kernel, spec: object, x: Tensor, weight: object) -> float:
        name = kernel.name
        return speed[name] if len(x) == 1 else 4 - speed[name]

    monkeypatch.setattr("mono_quant.kernels.timing._by_turns", each(seconds))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    STORE.forget()
    with kernels.use(None):
        assert same_bits(ran.layer(ran.x[:1]), ran.y[:1])
        ran.layer(ran.x)
        assert moved(ran.layer), "blocks are no choice, once codes lie in panels"
        speed["blocks"] = 0.01
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        STORE.forget()
        ran.layer(ran.x)
        assert not moved(ran.layer)
    STORE.forget()


@pytest.fixture
def by_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, float]]:
    """Let one kernel be the fastest for a single row and another for more; return their times."""
    times = {"integer": 2.0, "onednn": 3.0}

    def seconds(kernel: Kernel, spec: object, x: Tensor, weight: object) -> float:
        name = kernel.name
        if name not in times:
            return 9.0
        return times[name] if len(x) == 1 else 4 - times[name]

    monkeypatch.setattr("mono_quant.kernels.timing._by_turns", each(seconds))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    STORE.forget()
    with kernels.use(None):
        yield times
    STORE.forget()


only_packed_rows = pytest.mark.parametrize("ran", ["packed rows"], indirect=True)


def by_name(ran: Ran, name: str, x: Tensor) -> Tensor:
    with kernels.use(name):
        found: Tensor = copied(ran.layer)(x)
    return found


@only_packed_rows
def test_one_order_serves_all_batches_by_default(ran: Ran, by_turns: dict[str, float]) -> None:
    one = ran.x[:1]
    assert not same_bits(by_name(ran, "integer", one), by_name(ran, "onednn", one))
    assert same_bits(ran.layer(one), by_name(ran, "onednn", one))
    assert same_bits(ran.layer(ran.x), ran.y)
    assert moved(ran.layer)


@only_packed_rows
def test_double_memory_keeps_two_orders_where_both_win(
    ran: Ran, by_turns: dict[str, float]
) -> None:
    one = ran.x[:1]
    expected = by_name(ran, "integer", one)
    with kernels.memory("double"):
        for _ in range(2):
            assert same_bits(ran.layer(one), expected)
            assert same_bits(ran.layer(ran.x), ran.y)
        both = ran.holder._held
        assert not moved(ran.layer)
        assert both is not None
        known = 2 * 4 * COUNT  # of the canonical order: sums and scales
        assert kernel_bytes(ran.layer) == known + both.arranged.nbytes + both.arranged.beside
        ran.layer(one), ran.layer(ran.x)
        assert ran.holder._held is both, "neither is made anew"
        assert same_state(ran.layer.state_dict(), ran.state)
        for other in (copied(ran.layer), pickled(ran.layer), saved(ran.layer)):
            assert kernel_bytes(other) == 0
            assert same_state(other.state_dict(), ran.state)
            assert same_bits(other(ran.x), ran.y)
            assert same_bits(other(one), expected)
    assert same_bits(ran.layer(ran.x), ran.y)
    assert moved(ran.layer), "a single order again"


@only_packed_rows
def test_double_memory_keeps_one_order_where_that_wins_throughout(
    ran: Ran, by_turns: dict[str, float]
) -> None:
    by_turns["onednn"] = 2.05  # what `integer` gains for a single row may be chance
    with kernels.memory("double"):
        for x in (ran.x[:1], ran.x, ran.x[:1]):
            assert same_bits(ran.layer(x), by_name(ran, "onednn", x))
    assert moved(ran.layer)


@only_packed_rows
def test_writing_to_codes_is_seen_in_both_orders(ran: Ran, by_turns: dict[str, float]) -> None:
    with kernels.memory("double"):
        ran.layer(ran.x), ran.layer(ran.x[:1]), ran.layer(ran.x)
        assert not moved(ran.layer)
        ran.layer.packed_weights()["weight"].tensors["codes"].fill_(3)
        other = copied(ran.layer)
        assert same_bits(ran.layer(ran.x), other(ran.x))
        assert not same_bits(ran.layer(ran.x), ran.y)
        ran.layer.load_state_dict(ran.state)
        assert same_bits(ran.layer(ran.x), ran.y)
        assert ran.layer.double().float() is ran.layer
        assert kernel_bytes(ran.layer) == 0
        assert same_bits(ran.layer(ran.x), ran.y)


@only_packed_rows
def test_compiling_puts_one_order_back(ran: Ran, by_turns: dict[str, float]) -> None:
    torch.compiler.reset()
    with kernels.memory("double"):
        ran.layer(ran.x), ran.layer(ran.x[:1])
        compiled = torch.compile(ran.layer, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(ran.x), ran.plain, rtol=1e-4, atol=1e-5)
        assert ran.holder._held is None
        exported = torch.export.export(copied(ran.layer), (ran.x,))
        assert same_bits(exported.module()(ran.x), ran.plain)
