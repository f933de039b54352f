"""Whole LSTMs and GRUs on packed float16 weights, against torch's float layers in float64."""

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from mono_quant import Quantizer, kernel_bytes, kernels, load_model
from mono_quant.base import Kernel, KernelSpec
from mono_quant.kernels import REFERENCE, Fp16Sequences, select
from mono_quant.kernels.fp16_sequences import UnpackedSequences
from mono_quant.kernels.ops import fp16_packed_bytes, fp16_sequence_refusal
from mono_quant.kernels.store import STORE
from mono_quant.modules import QuantizedRecurrent, QuantizedWeight
from mono_quant.modules.layer import kernels_run
from mono_quant.operations import MatrixProduct
from mono_quant.recurrence import WholeSequence
from tests.helpers import noise, same_bits
from tests.kernels.cases import CPU

pytestmark = pytest.mark.skipif(
    fp16_sequence_refusal() is not None, reason=str(fp16_sequence_refusal())
)

WIDTH, UNITS = 300, 320
BITS16 = Quantizer().bits(16)
LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "LSTM": lambda: nn.LSTM(WIDTH, UNITS),
    "LSTM without bias": lambda: nn.LSTM(WIDTH, UNITS, bias=False),
    "deep LSTM": lambda: nn.LSTM(WIDTH, UNITS, 2, bidirectional=True, batch_first=True),
    "GRU": lambda: nn.GRU(WIDTH, UNITS, batch_first=True),
    "deep GRU": lambda: nn.GRU(WIDTH, UNITS, 3, bidirectional=True, bias=False),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def _in_use() -> Iterator[None]:
    with kernels.use("fp16"), torch.no_grad():
        yield


def quantized(source: nn.RNNBase) -> QuantizedRecurrent:
    made = BITS16.only("*").apply(source, progress=False).model
    assert isinstance(made, QuantizedRecurrent)
    return made


def layer(name: str) -> tuple[QuantizedRecurrent, nn.RNNBase]:
    """Return a quantized layer and its float twin in float64, whose weights were rounded alone."""
    torch.manual_seed(0)
    source = LAYERS[name]()
    return quantized(source), rounded(source)


def rounded(source: nn.RNNBase) -> nn.RNNBase:
    twin = copy.deepcopy(source).double()
    for key, parameter in twin.named_parameters():
        if key.startswith("weight"):
            parameter.copy_(source.get_parameter(key).half())
    return twin


def flat(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    assert isinstance(result, tuple)
    return [tensor for part in result for tensor in flat(part)]


def assert_near(found: object, expected: object) -> None:
    for one, other in zip(flat(found), flat(expected), strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).abs().max() <= 2e-6


def holders(made: nn.Module) -> list[QuantizedWeight]:
    return [part for part in made.modules() if isinstance(part, QuantizedWeight)]


def packed(made: nn.Module) -> bool:
    held = [one._buffers["codes"] is None for one in holders(made)]
    assert len(set(held)) == 1
    return held[0]


def doubled(x: PackedSequence) -> PackedSequence:
    return PackedSequence(x.data.double(), *x[1:])


@each_layer
def test_a_layer_is_the_float_layer_with_rounded_weights(name: str) -> None:
    made, twin = layer(name)
    x = noise(5, 4, WIDTH)
    with kernels_run() as ran:
        found = made(x)
    assert {made_by for _, made_by in ran.items()} == {"fp16"}
    assert {weight for _, weight in ran} == set(made.packed_weights())
    assert_near(found, twin(x.double()))
    single = noise(5, WIDTH, seed=1)
    made(x)
    assert packed(made)
    assert_near(made(single), twin(single.double()))


@each_layer
def test_states_are_taken_and_packed_sequences_in_any_order(name: str) -> None:
    made, twin = layer(name)
    count = made.num_layers * (2 if made.bidirectional else 1)
    h, c = noise(count, 3, UNITS, seed=2) / 3, noise(count, 3, UNITS, seed=3) / 3
    given, wide = ((h, c), (h.double(), c.double())) if made.mode == "LSTM" else (h, h.double())
    x = pack_sequence([noise(n, WIDTH, seed=n) for n in (3, 7, 1)], enforce_sorted=False)
    found = made(x, given)
    assert packed(made)
    assert_near(found, twin(doubled(x), wide))


@each_layer
def test_everybody_else_has_canonical_weights(name: str) -> None:
    made, _ = layer(name)
    state = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    with kernels.use("reference"):
        plain = flat(made(noise(5, 4, WIDTH)))

    def same(other: nn.Module) -> bool:
        found = other.state_dict()
        return list(found) == list(state) and all(
            same_bits(found[key], state[key]) for key in state
        )

    x = noise(5, 4, WIDTH)
    y = flat(made(x))
    stream = io.BytesIO()
    torch.save(made, stream)
    assert packed(made), "a copy leaves it as it is"
    stream.seek(0)
    copies = [
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        torch.load(stream, weights_only=False),
    ]
    fresh = quantized(LAYERS[name]())
    fresh.load_state_dict(made.state_dict())
    for other in (*copies, fresh, made):
        assert same(other)
        assert not packed(other)
        assert all(map(same_bits, flat(other(x)), y))
        assert packed(other)
        other.load_state_dict(state)
        assert same(other)
    made(x)
    moved = made.to(torch.float64)
    assert not packed(moved)
    moved.to(torch.float32)
    with kernels.use("reference"):
        assert all(map(same_bits, flat(made(x)), plain))


@each_layer
def test_a_file_is_the_same_before_and_after(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = BITS16.only("*").apply(LAYERS[name](), progress=False)
    before, after = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    result.save(before)
    y = flat(result.model(noise(5, 4, WIDTH)))
    assert packed(result.model)
    result.save(after)
    assert before.read_bytes() == after.read_bytes()
    loaded = load_model(after, LAYERS[name]())
    assert all(map(same_bits, flat(loaded(noise(5, 4, WIDTH))), y))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch
def test_an_exported_layer_holds_canonical_weights() -> None:
    made, twin = layer("LSTM")
    x = noise(5, 4, WIDTH)
    made(x)
    program = torch.export.export(made.eval(), (x,))
    assert_near(program.module()(x), twin(x.double()))
    codes = program.state_dict["quantized_weights.weight_hh_l0.codes"]
    assert codes.dtype == torch.float16
    assert not any(isinstance(one, torch.ScriptObject) for one in program.constants.values())


def test_a_bias_is_what_it_is_when_the_layer_is_called() -> None:
    torch.manual_seed(0)
    source = nn.GRU(WIDTH, UNITS)
    made, x = quantized(source), noise(5, 4, WIDTH)
    assert_near(made(x), rounded(source)(x.double()))
    for parameters in (source, made):
        parameters.get_parameter("bias_hh_l0").add_(1)
    assert_near(made(x), rounded(source)(x.double()))
    source.bias_ih_l0 = made.bias_ih_l0 = nn.Parameter(noise(3 * UNITS))
    assert_near(made(x), rounded(source)(x.double()))
    assert packed(made)


class Pair(nn.Module):
    """Two LSTMs that share all weights and have biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.LSTM(WIDTH, UNITS), nn.LSTM(WIDTH, UNITS)
        self.two.weight_ih_l0 = self.one.weight_ih_l0
        self.two.weight_hh_l0 = self.one.weight_hh_l0


def test_layers_with_tied_weights_add_their_own_biases_in_threads_too() -> None:
    source = Pair()
    model = BITS16.only("*").apply(source, progress=False).model
    x = noise(5, 4, WIDTH)
    expected = [flat(rounded(twin)(x.double())) for twin in (source.one, source.two)]
    wrong: list[float] = []

    def runs(place: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                found = flat((model.one, model.two)[place](x))
                error = (found[0].double() - expected[place][0]).abs().max()
                if error > 2e-6:
                    wrong.append(float(error))

    assert (expected[0][0] - expected[1][0]).abs().max() > 1e-3
    threads = [threading.Thread(target=runs, args=(place % 2,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert packed(model)
    assert len(holders(model)) == 2


def test_directions_that_share_a_weight_are_left_to_the_reference() -> None:
    torch.manual_seed(0)
    source = nn.LSTM(WIDTH, UNITS, bidirectional=True)
    source.weight_hh_l0_reverse = source.weight_hh_l0
    made, x = quantized(source), noise(5, 4, WIDTH)
    with kernels_run() as ran:
        found = made(x)
    assert set(ran.values()) == {"reference"}
    assert_near(found, rounded(source)(x.double()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_packing_would_change_are_decoded(value: float) -> None:
    made, _ = layer("LSTM")
    codes = made.packed_weights()["weight_hh_l0"].tensors["codes"]
    codes[0, 5, 5] = value
    x = noise(5, 4, WIDTH)
    with kernels.use("reference"):
        expected = made(x)
    with kernels_run() as ran:
        found = made(x)
    assert set(ran.values()) == {"reference"}
    assert all(map(same_bits, flat(found), flat(expected)))
    stored = made.state_dict()["quantized_weights.weight_hh_l0.codes"]
    assert same_bits(stored, codes)


def test_half_precision_is_computed_wide_and_returned_narrow() -> None:
    made, twin = layer("LSTM")
    x = noise(5, 4, WIDTH).to(torch.bfloat16)
    found = flat(made.to(torch.bfloat16)(x))
    biased = copy.deepcopy(twin)
    for key, parameter in biased.named_parameters():
        if key.startswith("bias"):
            parameter.copy_(parameter.to(torch.bfloat16))
    for one, other in zip(found, flat(biased(x.double())), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).abs().max() <= 2**-8
    assert packed(made)


def test_an_empty_batch_is_an_empty_result_and_an_empty_sequence_an_error() -> None:
    made, _ = layer("LSTM")
    assert [tuple(one.shape) for one in flat(made(noise(5, 0, WIDTH)))] == [
        (5, 0, UNITS),
        (1, 0, UNITS),
        (1, 0, UNITS),
    ]
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        made(noise(0, 4, WIDTH))


def test_gradients_reach_the_inputs_and_biases() -> None:
    made, _ = layer("GRU")
    x = noise(4, 5, WIDTH)
    made(x)
    with torch.enable_grad():
        x.requires_grad_()
        made(x)[0].sum().backward()
    for tensor in (x, made.get_parameter("bias_hh_l0")):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0


def test_bytes_that_fill_up_panels_and_biases_are_counted() -> None:
    made, _ = layer("GRU")
    assert kernel_bytes(made) == 0
    made(noise(4, 5, WIDTH))
    rows = 3 * UNITS
    codes = 2 * rows * (WIDTH + UNITS)
    filled = fp16_packed_bytes(rows, WIDTH) + fp16_packed_bytes(rows, UNITS) - codes
    assert kernel_bytes(made) == filled + 2 * 4 * rows
    assert filled <= codes, "no more than the float32 layer takes"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (nn.RNN(WIDTH, UNITS), "torch has no such operator for RNN_TANH"),
        (nn.LSTM(WIDTH, UNITS, proj_size=300), "torch has no such operator for a projected h"),
        (nn.GRU(6, 8), "336 values are too few to gain from it"),
        (nn.LSTM(40, 256), "the packed weights would take 1.7 times float32's bytes"),
    ],
    ids=["RNN", "projected", "small", "narrow"],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_what_torch_cannot_do_or_would_fill_up_is_decoded(source: nn.RNNBase, why: str) -> None:
    made = quantized(source)
    x = noise(5, 4, source.input_size)
    with kernels_run() as ran:
        found = made(x)
    assert set(ran.values()) == {"reference"}
    assert_near(found, rounded(source)(x.double()))
    weight = made.packed_weights()["weight_hh_l0"]
    shapes = tuple(
        (one.layout.stack[1], one.layout.stack[2]) for one in made.packed_weights().values()
    )
    operation = WholeSequence(made.mode, shapes, projected=bool(made.proj_size))
    spec = KernelSpec(operation, weight.scheme, weight.layout)
    assert Fp16Sequences().supports(spec, CPU, torch.float32) == why


def test_other_weights_operations_and_dtypes_are_left_to_others() -> None:
    made, kernel = layer("LSTM")[0], Fp16Sequences()
    weight = made.packed_weights()["weight_hh_l0"]
    operation = WholeSequence("LSTM", ((4 * UNITS, UNITS),) * 2)
    spec = KernelSpec(operation, weight.scheme, weight.layout)
    assert kernel.supports(spec, CPU, torch.float32) is None
    assert kernel.supports(spec, CPU, torch.float64) == "inputs are torch.float64"
    assert "not on a CPU" in str(kernel.supports(spec, torch.device("meta"), torch.float32))
    product = KernelSpec(MatrixProduct(), weight.scheme, weight.layout)
    assert kernel.supports(product, CPU, torch.float32) == (
        "it is a MatrixProduct, not a whole sequence"
    )
    eight = Quantizer().activations(None).apply(LAYERS["LSTM"](), progress=False).model
    assert isinstance(eight, QuantizedRecurrent)
    weight = eight.packed_weights()["weight_hh_l0"]
    spec = KernelSpec(operation, weight.scheme, weight.layout)
    assert str(kernel.supports(spec, CPU, torch.float32)).startswith("the weight is 8-bit")


def test_another_engine_of_torch_leaves_the_layer_to_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, twin = layer("LSTM")
    x = noise(5, 4, WIDTH)
    monkeypatch.setattr(
        "mono_quant.kernels.fp16_sequences.fp16_sequence_refusal", lambda: "not here"
    )
    STORE.forget()  # what was chosen before
    with kernels_run() as ran:
        assert_near(made(x), twin(x.double()))
    assert set(ran.values()) == {"reference"}
    STORE.forget()


@pytest.mark.parametrize("faster", ["fp16", "reference"])
def test_one_sequence_decides_whether_weights_are_packed_and_each_kind_which_is_faster(
    faster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed: set[tuple[str, int, int]] = set()
    speed = {"fp16": 2.0, "reference": 1.0 if faster == "reference" else 3.0}

    def by_turns(
        kernels: Sequence[Kernel], spec: object, x: Tensor, weight: object
    ) -> dict[str, float]:
        names = [kernel.name for kernel in kernels]
        timed.update((name, *x.shape[:2]) for name in names)
        many = 1.0 if x.shape[1] > 4 or len(x) > 64 else 3.0
        return {name: speed.get(name, many) for name in names}

    monkeypatch.setattr("mono_quant.kernels.timing._by_turns", by_turns)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    STORE.forget()
    made, _ = layer("LSTM")
    with kernels.use(None):
        for steps, batch, first in ((5, 3, True), (5, 40, False), (200, 1, False), (5, 3, True)):
            with kernels_run() as ran:
                made(noise(steps, batch, WIDTH))
            assert set(ran.values()) == {faster if first else "reference"}
            assert packed(made) == (faster == "fp16"), "the order stays"
    usual = {("fp16", 32, 1), ("reference", 32, 1)}
    others = {(name, *x) for name in ("fp16", "unpacked") for x in ((8, 4), (8, 32), (128, 1))}
    assert timed == (usual | others if faster == "fp16" else usual)
    STORE.forget()


def test_what_is_timed_computes_the_same_by_both() -> None:
    made, _ = layer("LSTM")
    weight = made.packed_weights()["weight_hh_l0"]
    operation = WholeSequence("LSTM", ((4 * UNITS, UNITS),) * 2)
    spec = KernelSpec(operation, weight.scheme, weight.layout)
    x = noise(5, 2, UNITS)
    expected = REFERENCE(spec, x, weight, None)
    for kernel in (Fp16Sequences(), UnpackedSequences()):
        torch.testing.assert_close(kernel(spec, x, weight, None), expected, rtol=0, atol=1e-6)
    followed = x.requires_grad_()
    with torch.enable_grad():
        assert select(spec, CPU, torch.float32, 1, followed, arrange=lambda: True) is REFERENCE


def test_inference_mode_leaves_ordinary_tensors_behind() -> None:
    made, twin = layer("LSTM")
    x = noise(5, 4, WIDTH)
    with torch.inference_mode():
        assert_near(made(x), twin(x.double()))
        made.get_parameter("bias_hh_l0").data.add_(1)
        made(x)
    twin.get_parameter("bias_hh_l0").add_(1)
    assert packed(made)
    assert_near(made(x), twin(x.double()))
    assert not made.state_dict()["quantized_weights.weight_hh_l0.codes"].is_inference()
