"""Odd models, each by its name: quantized, saved, loaded and run, or refused with a reason.

What is tested where it belongs, and not again here:

- weights that are parametrized: `tests/layers/test_parametrizations.py`;
- ScriptModules, lazy, sparse, meta and inference tensors, compiled models, models that are
  quantized already: `tests/modules/test_refused_models.py`;
- views of one memory, layers under two names: `tests/modules/test_ties.py` and
  `tests/plan/test_ties.py`;
- NaN and infinite weights: `tests/plan/test_run.py`; a layer that no data reached:
  `tests/test_calibration.py` and `tests/plan/test_statistics.py`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import pytest
import torch
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils.parametrizations import weight_norm

from mono_quant import InputError, QuantizedModule, Quantizer, load_model, sqnr_db
from tests.helpers import TiedModel, noise, same_bits, same_tensors


class Case(NamedTuple):
    """An odd model and what it is called with."""

    make: Callable[[], nn.Module]
    batch: object
    quantized: int = 1
    """How many of its modules are quantized."""


class Called(nn.Module):
    """Takes keyword arguments only, one of them optional, and returns nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 32)

    def forward(self, *, x: Tensor, scale: Tensor | None = None) -> dict[str, list[Tensor]]:
        y: Tensor = self.layer(x)
        return {"out": [y if scale is None else y * scale, y.sum(-1)]}


class Twice(nn.Module):
    """Uses one module twice, and its weight once more by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(torch.relu(self.layer(x)))
        return found


class Nested(nn.Module):
    """Keeps layers in containers of containers, by names with odd characters."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.ModuleDict({"a-b": nn.ModuleList([nn.Linear(64, 64), nn.Identity()])})
        self.blocks = nn.ModuleList([nn.ModuleDict({"deep": inner}), nn.Linear(64, 16)])

    def forward(self, x: Tensor) -> Tensor:
        first = self.get_submodule("blocks.0.deep.a-b.0")
        found: Tensor = self.blocks[1](torch.relu(first(x)))
        return found


class Transient(nn.Module):
    """Has a buffer that a state dict leaves out, and one that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 32)
        self.register_buffer("table", torch.linspace(0, 1, 32), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x) + self.get_buffer("table")
        return found


def with_weight(weight: Tensor) -> nn.Module:
    """Return a layer around a weight, without a bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(layer)


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    model[0].requires_grad_(False)
    return model


def hooked() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    model[0].register_forward_pre_hook(_doubled)
    model[0].register_forward_hook(_shifted)
    return model


def _doubled(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (2 * inputs[0],)


def _shifted(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + 1


ROWS = noise(16, 64)
ODD: dict[str, Case] = {
    "tied weights": Case(TiedModel, torch.arange(64), 3),
    "one module used twice": Case(Twice, ROWS),
    "a parametrized weight": Case(lambda: nn.Sequential(weight_norm(nn.Linear(64, 32))), ROWS),
    "a weight that is a view of a larger one": Case(
        lambda: with_weight(noise(96, 64)[32:64]), ROWS
    ),
    "a transposed weight": Case(lambda: with_weight(noise(64, 48).t()), ROWS),
    "a weight of every second row": Case(lambda: with_weight(noise(96, 64)[::2]), ROWS),
    "a layer without bias": Case(lambda: nn.Sequential(nn.Linear(64, 48, bias=False)), ROWS),
    "half precision": Case(lambda: nn.Sequential(nn.Linear(64, 48)).half(), ROWS.half()),
    "bfloat16": Case(lambda: nn.Sequential(nn.Linear(64, 48)).bfloat16(), ROWS.bfloat16()),
    "double precision": Case(lambda: nn.Sequential(nn.Linear(64, 48)).double(), ROWS.double()),
    "frozen parameters": Case(frozen, ROWS, 2),
    "buffers that are not persistent": Case(Transient, ROWS),
    "keyword arguments": Case(Called, {"x": ROWS, "scale": torch.tensor(3.0)}),
    "recursive containers": Case(Nested, ROWS, 2),
}


def run(model: nn.Module, batch: object) -> list[Tensor]:
    """Return the tensors that a model gives for a batch."""
    with torch.no_grad():
        output: object = model(**batch) if isinstance(batch, dict) else model(batch)
    if isinstance(output, dict):
        return [one for found in output.values() for one in found]
    return [cast("Tensor", output)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", ODD.values(), ids=ODD)
def test_an_odd_model_is_quantized_saved_loaded_and_run(
    case: Case, bits: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = case.make().eval()
    expected = run(model, case.batch)
    quantizer = Quantizer().bits(bits).only("*").fit([case.batch])
    result = quantizer.apply(model)
    quantized = [one for one in result.model.modules() if isinstance(one, QuantizedModule)]
    assert len(quantized) == case.quantized
    found = run(result.model, case.batch)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert sqnr_db(other, one) > (15 if bits == 4 else 30)
    assert all(map(same_bits, run(model, case.batch), expected)), "the source was changed"
    loaded = load_model(result.save(tmp_path / "model.safetensors"), case.make().eval())
    assert same_tensors(loaded, result.model)
    assert all(map(same_bits, run(loaded, case.batch), found))
    assert result.validate()
    grads = [one.requires_grad for one in model.parameters()]
    if not any(".parametrizations" in name for name, _ in model.named_modules()):
        assert [one.requires_grad for one in result.dequantize().parameters()] == grads
    in_place = quantizer.apply_(model)
    assert same_tensors(in_place.model, result.model)


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_layer_of_zero_size_stays_of_zero_size(
    shape: tuple[int, int], bits: int, tmp_path: Path
) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(*shape), nn.Linear(shape[1], 8)).eval()

    model, x = make(), torch.zeros(3, shape[0])
    result = Quantizer().bits(bits).only("*").apply(model)
    assert torch.isfinite(result.model(x)).all()
    assert result.report.to_json()
    loaded = load_model(result.save(tmp_path / "model.pt"), make())
    assert same_bits(loaded(x), result.model(x))


def test_hooks_of_a_layer_run_as_before() -> None:
    model = hooked().eval()
    result = Quantizer().activations(None).apply(model)
    assert sqnr_db(model(ROWS), result.model(ROWS)) > 30
    layer = result.dequantize().get_submodule("0")
    assert isinstance(layer, nn.Linear)
    by_hand = torch.relu(nn.functional.linear(2 * ROWS, layer.weight, layer.bias) + 1)
    assert sqnr_db(by_hand, result.model(ROWS)) > 60


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named_whatever_else_is_odd(odd: float) -> None:
    model = TiedModel()
    with torch.no_grad():
        model.embedding.weight[3, 5] = odd
    before = model.embedding.weight.clone()
    with pytest.raises(InputError, match=r"embedding\.weight.*NaN or infinity"):
        Quantizer().only("*").apply_(model)
    assert same_bits(model.embedding.weight, before)


@pytest.fixture
def alone() -> Iterator[None]:
    """Make a group of this one process, without a network."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_distributed_parameter_is_refused_with_what_to_do(in_place: bool) -> None:
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(64, 8))
    layer, weight = model[0], model.get_parameter("0.weight")
    layer.weight = nn.Parameter(distribute_tensor(weight.detach(), mesh))
    apply = Quantizer().apply_ if in_place else Quantizer().apply
    with pytest.raises(InputError, match=r"0\.weight is a DTensor.*full_tensor\(\)"):
        apply(model)


@pytest.mark.usefixtures("alone")
def test_a_sharded_model_is_refused_with_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(InputError, match=r"0\.weight is a DTensor.*full_tensor\(\)"):
        Quantizer().apply(model)


def sharded(*, own_names: bool) -> FullyShardedDataParallel:
    """Return a model in torch's first kind of sharding, of which one process has all."""
    return FullyShardedDataParallel(
        nn.Sequential(nn.Linear(64, 8)),
        sharding_strategy=ShardingStrategy.NO_SHARD,
        use_orig_params=own_names,
        device_id=torch.device("cpu"),
    )


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("own_names", [False, True])
def test_a_wrapper_that_shards_its_parameters_is_refused_with_what_to_do(
    own_names: bool, in_place: bool
) -> None:
    """Else it would lose its hooks, or be left float as a module without weights."""
    wrapped = sharded(own_names=own_names)
    apply = Quantizer().apply_ if in_place else Quantizer().apply
    with pytest.raises(InputError, match=r"the model is a Fully\w+Parallel, .*full_tensor\(\)"):
        apply(wrapped)
    with pytest.raises(InputError, match=r"^1 is a FullyShardedDataParallel, of whose weights"):
        apply(nn.Sequential(nn.ReLU(), wrapped))
    assert wrapped(torch.ones(2, 64)).shape == (2, 8)


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:When using ``NO_SHARD``:UserWarning")  # as it should
def test_what_is_inside_of_such_a_wrapper_is_refused_too() -> None:
    wrapped = sharded(own_names=True)
    with pytest.raises(InputError, match=r"0\.weight lies in the memory of a FullySharded"):
        Quantizer().apply(wrapped.module)
    whole = nn.Sequential(nn.Linear(64, 8))
    whole.load_state_dict(wrapped.state_dict())
    assert Quantizer().only("*").apply(whole).validate(ROWS)
