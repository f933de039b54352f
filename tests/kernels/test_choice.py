"""The choice among kernels: the fastest of those that can do what is asked of them."""

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor, nn

from mono_quant import ConfigurationError, QuantizedLayer, Quantizer, kernels
from mono_quant.base import Kernel, KernelSpec, PackedTensor
from mono_quant.kernels import ops, store, trial
from mono_quant.kernels.store import STORE
from mono_quant.kernels.switches import Switch
from tests.helpers import noise, same_bits
from tests.kernels.cases import CPU, DECODED, FLOATS, INTEGERS, each, layer, spec_of


@attrs.frozen
class Negative:
    """Does static inputs of one dtype, and gives the product with its sign turned."""

    name: str = "negative"
    asked: list[tuple[str, torch.dtype]] = attrs.field(factory=list)

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        self.asked.append((device.type, dtype))
        static = spec.activation is not None and spec.activation.mode == "static"
        return None if static and dtype == torch.float32 else "static inputs of float32 only"

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        return -kernels.REFERENCE(spec, x, weight, bias)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Forget what was chosen when the test is over."""
    yield
    STORE.forget()


@pytest.mark.usefixtures("forgotten")
def test_a_kernel_is_asked_for_scheme_inputs_device_and_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, source = noise(3, 64), nn.Linear(64, 8)
    dynamic, static = Quantizer().apply(source).model, Quantizer().fit(x).apply(source).model
    expected = [model(x) for model in (dynamic, static)]
    ours = Negative()
    monkeypatch.setattr(kernels, "KERNELS", (ours, *kernels.KERNELS))
    STORE.forget()
    assert same_bits(dynamic(x), expected[0])
    assert same_bits(static(x), -expected[1])
    assert ours.asked == [("cpu", torch.float32)] * 2
    wide = x.double()
    assert static.double()(wide).dtype == torch.float64
    assert ours.asked[-1] == ("cpu", torch.float64)


def test_the_reference_can_do_everything_and_is_asked_last() -> None:
    assert kernels.KERNELS[-1] is kernels.REFERENCE
    spec = KernelSpec.__new__(KernelSpec)
    assert kernels.REFERENCE.supports(spec, torch.device("meta"), torch.int8) is None


def chosen(made: QuantizedLayer, *given: Tensor | None, rows: int = 1) -> str:
    return kernels.select(spec_of(made), CPU, torch.float32, rows, *given).name


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[str, int]]]:
    """Make the blocks the fastest up to 8 rows; return what was timed, with how many rows."""
    asked: list[tuple[str, int]] = []

    def seconds(kernel: Kernel, spec: KernelSpec, x: Tensor, weight: PackedTensor) -> float:
        asked.append((kernel.name, len(x)))
        kernel(spec, x, weight, None)
        return 1.0 if (kernel.name == "blocks") == (len(x) <= 8) else 2.0

    monkeypatch.setattr("mono_quant.kernels.timing._by_turns", each(seconds))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("mono_quant.kernels.integer.int_mm_refusal", lambda: None)
    STORE.forget()
    yield asked
    STORE.forget()


@pytest.fixture(scope="module")
def made() -> QuantizedLayer:
    return layer(INTEGERS["dynamic"], 65, 1040)


def test_each_shape_and_batch_is_timed_once(
    made: QuantizedLayer, timed: list[tuple[str, int]]
) -> None:
    assert [chosen(made, rows=rows) for rows in (1, 5, 8, 9, 16)] == [
        *["blocks"] * 3,
        *["integer"] * 2,
    ]
    assert timed == [(name, rows) for rows in (1, 8, 16) for name in ("integer", "blocks")]
    other = layer(INTEGERS["dynamic"], 65, 1040, bias=False)
    assert chosen(other, rows=7) == "blocks"
    assert chosen(other, rows=10_000) == chosen(other, rows=512) == "integer"
    assert timed[6:] == [("integer", 512), ("blocks", 512)]


@pytest.mark.parametrize("grid", DECODED)
def test_every_grid_can_be_timed(grid: str, timed: list[tuple[str, int]]) -> None:
    assert chosen(layer(DECODED[grid], 65, 1040), rows=2) == "blocks"


def test_kernels_are_timed_on_the_device_of_inputs(
    made: QuantizedLayer, timed: list[tuple[str, int]]
) -> None:
    with torch.device("meta"):
        assert chosen(made, rows=2) == "blocks"
    assert len(timed) == 2


def test_what_was_timed_is_kept_in_a_file(
    made: QuantizedLayer, timed: list[tuple[str, int]]
) -> None:
    assert chosen(made) == "blocks"
    STORE.forget()  # as a new process does
    assert chosen(made) == "blocks"
    assert len(timed) == 2


def test_times_that_a_file_makes_up_are_ignored(
    made: QuantizedLayer, timed: list[tuple[str, int]]
) -> None:
    chosen(made)
    text = store.path().read_text(encoding="utf-8")
    store.path().write_text(text.replace("blocks 1", "blocks fast"), encoding="utf-8")
    STORE.forget()
    assert chosen(made) == "blocks"
    assert len(timed) == 4


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', "\0", "[" * 10_000])
def test_a_file_that_is_no_such_file_is_ignored(
    made: QuantizedLayer, timed: list[tuple[str, int]], text: str
) -> None:
    place = store.path()
    place.parent.mkdir(parents=True)
    place.write_text(text, encoding="utf-8")
    assert chosen(made) == "blocks"
    STORE.forget()
    assert chosen(made) == "blocks"
    assert len(timed) == 2, "the file was not written anew"


def test_a_kernel_that_a_file_makes_up_is_ignored(
    made: QuantizedLayer, timed: list[tuple[str, int]]
) -> None:
    chosen(made)
    text = store.path().read_text(encoding="utf-8")
    store.path().write_text(text.replace(", blocks ", ", turbo "), encoding="utf-8")
    STORE.forget()
    assert chosen(made) == "blocks"
    assert len(timed) == 4


def test_where_no_file_can_be_written_findings_last_for_the_process(
    made: QuantizedLayer,
    timed: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert chosen(made) == chosen(made) == "blocks"
    assert len(timed) == 2


def test_use_names_a_kernel_for_good_or_for_a_while(made: QuantizedLayer) -> None:
    for name in ("integer", "blocks", "reference"):
        with kernels.use(name):
            assert chosen(made) == name
            with kernels.use("reference"):
                assert chosen(made) == "reference"
            assert chosen(made) == name
    kernels.use("blocks")
    assert chosen(made) == "blocks"
    kernels.use(None)
    assert kernels.use.current is None
    grouped = layer(Quantizer().bits(4), 81, 832)
    with kernels.use("integer"):
        assert chosen(grouped) == "reference", "the kernel cannot do it"


Outside = Callable[[type[Switch], str], None]


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Outside]:
    """Say a word in the environment for one test."""

    def say(switch: type[Switch], word: str) -> None:
        monkeypatch.setenv(switch.variable, word)
        switch.reread()

    yield say
    monkeypatch.undo()
    kernels.use.reread()
    kernels.memory.reread()


def test_the_environment_names_a_kernel_and_use_overrules_it(
    made: QuantizedLayer, outside: Outside
) -> None:
    outside(kernels.use, "blocks")
    assert chosen(made) == "blocks"
    with kernels.use("integer"):
        assert chosen(made) == "integer"
    outside(kernels.use, "")
    assert chosen(made) in {"integer", "blocks"}


def test_a_kernel_that_is_none_is_refused(made: QuantizedLayer, outside: Outside) -> None:
    with pytest.raises(ConfigurationError, match=r"'turbo'.*blocks, .*integer, .*reference"):
        kernels.use("turbo")
    assert kernels.use.current is None
    outside(kernels.use, "turbo")
    with pytest.raises(ConfigurationError, match="turbo"):
        chosen(made)


def test_gradients_take_the_reference(made: QuantizedLayer) -> None:
    x = noise(2, 1040).requires_grad_()
    with kernels.use("integer"):
        assert chosen(made, x) == chosen(made, x.detach(), x) == "reference"
        assert chosen(made, x.detach(), None) == "integer"
        with torch.no_grad():
            assert chosen(made, x) == "integer"
        made(x).sum().backward()
    assert x.grad is not None
    weight = made.packed_weights()["weight"].dequantize()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # within torch
def test_transforms_of_functions_take_the_reference() -> None:
    made = layer(FLOATS["8-bit"], 65, 1040)
    x, direction = noise(2, 1040), noise(2, 1040, seed=1)
    weight = made.packed_weights()["weight"].dequantize()
    with torch.no_grad(), kernels.use("integer"):
        torch.testing.assert_close(torch.vmap(made)(x), made(x), rtol=1e-4, atol=1e-3)
        tangent = torch.func.jvp(made, (x,), (direction,))[1]
    torch.testing.assert_close(tangent, direction @ weight.t(), rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # within torch
@pytest.mark.filterwarnings("ignore::mono_quant.SlowPathWarning")  # a trace reads all attributes
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # and follows no sizes
def test_a_traced_layer_is_the_reference(made: QuantizedLayer) -> None:
    x = noise(2, 1040)
    with torch.no_grad(), kernels.use("integer"):
        traced = torch.jit.trace(made, x)  # type: ignore[no-untyped-call]  # torch leaves it so
    with torch.no_grad(), kernels.use("reference"):
        for rows in (x, noise(5, 1040)):
            assert same_bits(traced(rows), made(rows))


def test_a_compiled_or_exported_layer_is_the_reference(made: QuantizedLayer) -> None:
    x = noise(2, 1040)
    torch.compiler.reset()
    with torch.no_grad(), kernels.use("integer"):
        compiled = torch.compile(made, fullgraph=True, backend="eager")(x)
        exported = torch.export.export(made, (x,)).module()(x)
        assert not same_bits(made(x), compiled)
    with torch.no_grad(), kernels.use("reference"):
        assert same_bits(made(x), compiled)
        assert same_bits(made(x), exported)


def test_a_copy_that_ran_computes_the_same_bits(made: QuantizedLayer) -> None:
    x = noise(3, 1040)
    with torch.no_grad():
        expected = made(x)
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert list(other.state_dict()) == list(made.state_dict())
            assert same_bits(other(x), expected)


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let nothing be known of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    STORE.forget()
    trial.refusal.cache_clear()
    yield
    STORE.forget()
    trial.refusal.cache_clear()


DEATHS = [
    ("import os; os.abort()", "the process died of SIGABRT"),
    ("raise RuntimeError('no such operator')", "RuntimeError: no such operator"),
    ("import sys; sys.exit(3)", "the process ended with 3"),
]


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(("program", "why"), DEATHS)
def test_a_trial_that_fails_is_a_refusal_that_says_why(program: str, why: str) -> None:
    assert trial.refusal("it", program) == f"it failed on trial: {why}"


@pytest.mark.usefixtures("untried")
def test_a_trial_is_made_once_on_a_machine(tmp_path: Path) -> None:
    mark = tmp_path / "tried"
    program = f"open({str(mark)!r}, 'a').write('x')"
    assert trial.refusal("it", program) is None
    trial.refusal.cache_clear()  # as a new process does
    STORE.forget()
    assert trial.refusal("it", program) is None
    assert mark.read_text() == "x"
    other = "raise RuntimeError('no such order')"
    assert trial.refusal("it", other) == "it failed on trial: RuntimeError: no such order"


_LONG = "import time; time.sleep(60)"


@pytest.mark.usefixtures("untried")
def test_a_trial_that_could_not_be_held_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        assert trial.refusal("it", "") == "it could not be tried: FileNotFoundError"
        trial.refusal.cache_clear()
        patch.undo()
        patch.setattr(trial, "_TIMEOUT_S", 0.01)
        assert trial.refusal("it", _LONG) == "it could not be tried: TimeoutExpired"
    trial.refusal.cache_clear()
    assert trial.refusal("it", "") is None


@pytest.mark.usefixtures("untried")
def test_the_trial_of_the_integer_product_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_TRIAL", "import os; os.abort()")
    assert str(ops.int_mm_refusal()).startswith("the integer product failed on trial: ")


def test_memory_is_one_of_two_words_from_the_call_or_the_environment(outside: Outside) -> None:
    assert not kernels.memory.is_double()
    with kernels.memory("double"):
        assert kernels.memory.is_double()
        with kernels.memory("single"):
            assert not kernels.memory.is_double()
    outside(kernels.memory, "double")
    assert kernels.memory.is_double()
    with kernels.memory("single"):
        assert not kernels.memory.is_double()
    with pytest.raises(ConfigurationError, match="no amount of memory 'triple', only double"):
        kernels.memory("triple")
    assert kernels.use.current is kernels.memory.current is None
