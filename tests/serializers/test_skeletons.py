"""A skeleton that does not fit is left as it was, and the error says where it does not."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    CheckpointError,
    InputError,
    MonoQuantError,
    Quantizer,
    UnknownKindError,
    UnsupportedLayerError,
    load_model,
)
from tests.helpers import TiedModel, noise, same_bits, same_tensors
from tests.serializers.files import SUFFIXES, Header, assert_same, forge, small

Change = Callable[[nn.Sequential], object]
each_suffix = pytest.mark.parametrize("suffix", SUFFIXES)

MISFITS: dict[str, tuple[Change, type[MonoQuantError], str]] = {
    "a layer more": (
        lambda model: model.append(nn.Linear(4, 4)),
        CheckpointError,
        r"the model has 3\.bias, 3\.weight, which the file lacks",
    ),
    "a parameter more": (
        lambda model: model.register_parameter("gain", nn.Parameter(torch.ones(3))),
        CheckpointError,
        "the model has gain, which the file lacks",
    ),
    "a buffer more": (
        lambda model: model.register_buffer("seen", torch.ones(3)),
        CheckpointError,
        "the model has seen, which the file lacks",
    ),
    "a quantized layer less": (
        lambda model: model.pop(2),
        CheckpointError,
        r"the file has '2\.weight', and the model has no '2'",
    ),
    "a norm less": (
        lambda model: model.__setitem__(1, nn.Identity()),
        CheckpointError,
        r"the file has 1\.bias, 1\.num_batches_tracked, 1\.running_mean and 2 more, which the "
        "model lacks",
    ),
    "a bias less": (
        lambda model: model.__setitem__(2, nn.Linear(16, 4, bias=False)),
        CheckpointError,
        r"the file has 2\.bias, which the model lacks",
    ),
    "a bias of another size": (
        lambda model: model[2].register_parameter("bias", nn.Parameter(torch.zeros(5))),
        CheckpointError,
        r"2\.bias is \(4,\) in the file and \(5,\) in the model",
    ),
    "a norm of another size": (
        lambda model: model.__setitem__(1, nn.BatchNorm1d(8)),
        CheckpointError,
        r"1\.\w+ is \(16,\) in the file and \(8,\) in the model",
    ),
    "a weight of another size": (
        lambda model: model.__setitem__(2, nn.Linear(32, 4)),
        CheckpointError,
        r"2\.weight is \(4, 16\) in the file and \(4, 32\) in the model",
    ),
    "a convolution in its place": (
        lambda model: model.__setitem__(2, nn.Conv1d(16, 4, 1)),
        CheckpointError,
        r"2\.weight is \(4, 16\) in the file and \(4, 16, 1\) in the model",
    ),
    "no layer in its place": (
        lambda model: model.__setitem__(2, nn.ReLU()),
        UnsupportedLayerError,
        r"no LayerQuantizer knows '2', a ReLU \(the file says kind 'linear'\)",
    ),
    "a parameter where a count was": (
        lambda model: model[1].register_buffer("num_batches_tracked", torch.tensor([1, 2])),
        CheckpointError,
        r"1\.num_batches_tracked is \(\) in the file and \(2,\) in the model",
    ),
}


@each_suffix
@pytest.mark.parametrize(("change", "kind", "message"), MISFITS.values(), ids=MISFITS)
def test_a_skeleton_that_does_not_fit_is_left_as_it_was(
    change: Change, kind: type[MonoQuantError], message: str, suffix: str, tmp_path: Path
) -> None:
    path = Quantizer().bits(4).only("*").apply(small()).save(tmp_path / f"model{suffix}")
    skeleton = small()
    change(skeleton)
    before = copy.deepcopy(skeleton)
    objects = {name: id(tensor) for name, tensor in skeleton.named_parameters()}
    modules = {name: id(module) for name, module in skeleton.named_modules()}
    with pytest.raises(kind, match=message):
        load_model(path, skeleton)
    assert same_tensors(skeleton, before)
    assert objects == {name: id(tensor) for name, tensor in skeleton.named_parameters()}
    assert modules == {name: id(module) for name, module in skeleton.named_modules()}
    for module, twin in zip(skeleton.modules(), before.modules(), strict=True):
        assert type(module) is type(twin)


@each_suffix
def test_a_container_of_an_unknown_kind_leaves_the_skeleton_as_it_was(
    suffix: str, tmp_path: Path
) -> None:
    path = Quantizer().apply(small()).save(tmp_path / f"model{suffix}")

    def edit(header: Header, _: dict[str, Tensor]) -> None:
        header["containers"] = [{"kind": "nonsense"}]

    forge(path, edit)
    skeleton = small()
    before = copy.deepcopy(skeleton)
    with pytest.raises(UnknownKindError, match="nonsense"):
        load_model(path, skeleton)
    assert same_tensors(skeleton, before)
    assert type(skeleton[0]) is nn.Linear


@each_suffix
def test_integers_do_not_fill_a_float_parameter(suffix: str, tmp_path: Path) -> None:
    path = Quantizer().apply(small()).save(tmp_path / f"model{suffix}")

    def edit(_: Header, tensors: dict[str, Tensor]) -> None:
        tensors["2.bias"] = tensors["2.bias"].to(torch.int64)

    forge(path, edit)
    skeleton = small()
    before = copy.deepcopy(skeleton)
    with pytest.raises(CheckpointError, match=r"2\.bias"):
        load_model(path, skeleton)
    assert same_tensors(skeleton, before)
    assert type(skeleton[0]) is nn.Linear


@each_suffix
def test_a_quantized_model_is_no_skeleton(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().apply(small())
    path = result.save(tmp_path / f"model{suffix}")
    with pytest.raises(CheckpointError, match="is quantized already; give a float skeleton"):
        load_model(path, result.model)


@each_suffix
def test_a_skeleton_may_be_filled_after_a_failure(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().apply(small())
    good = result.save(tmp_path / f"good{suffix}")
    bad = Quantizer().apply(nn.Sequential(nn.Linear(8, 8))).save(tmp_path / f"bad{suffix}")
    skeleton = small()
    with pytest.raises(CheckpointError):
        load_model(bad, skeleton)
    assert_same(load_model(good, skeleton), result.model)


@each_suffix
def test_an_untied_skeleton_is_tied_by_the_file(suffix: str, tmp_path: Path) -> None:
    """The file says which weights are one; the skeleton's own do not matter."""
    result = Quantizer().only("*").apply(TiedModel())
    path = result.save(tmp_path / f"model{suffix}")
    untied = TiedModel()
    untied.head.weight = nn.Parameter(torch.randn(64, 64))
    assert_same(load_model(path, untied), result.model)


@each_suffix
def test_an_untied_file_unties_a_skeleton(suffix: str, tmp_path: Path) -> None:
    untied = TiedModel()
    untied.head.weight = nn.Parameter(torch.randn(64, 64))
    result = Quantizer().bits(4).only("middle").apply(untied)
    loaded = load_model(result.save(tmp_path / f"model{suffix}"), TiedModel())
    assert_same(loaded, result.model)
    assert loaded.head.weight is not loaded.embedding.weight


@each_suffix
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_lazy_norm_is_filled(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().apply(small())
    path = result.save(tmp_path / f"model{suffix}")
    skeleton = nn.Sequential(nn.Linear(64, 16), nn.LazyBatchNorm1d(), nn.Linear(16, 4)).eval()
    try:
        loaded = load_model(path, skeleton)
    except MonoQuantError:
        return  # a reason is as good
    x = torch.randn(3, 64)
    torch.testing.assert_close(loaded(x), result.model(x), rtol=0, atol=0)


@each_suffix
def test_a_model_with_extra_state_is_refused_at_saving(suffix: str, tmp_path: Path) -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> int:
            return 3

        def set_extra_state(self, state: object) -> None:
            pass

    result = Quantizer().apply(nn.Sequential(nn.Linear(8, 8), Counting(8, 8)))
    with pytest.raises(CheckpointError, match=r"1 keeps extra state beside its tensors"):
        result.save(tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


def test_two_layers_of_a_file_do_not_go_into_one_module(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    path = Quantizer().apply(source).save(tmp_path / "model.safetensors")
    layer = nn.Linear(64, 64)
    skeleton = nn.Sequential(layer, nn.ReLU(), layer)
    with pytest.raises(CheckpointError, match="'2' and '0' are one module in the model and two"):
        load_model(path, skeleton)


class Caching(nn.Module):
    """Registers a buffer when it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "cache"):
            self.register_buffer("cache", torch.ones(64), persistent=False)
        found: Tensor = self.layer(x) * self.get_buffer("cache")
        return found


@pytest.mark.parametrize("run_before", [False, True])
def test_a_buffer_that_the_forward_makes_is_no_part_of_the_model(
    run_before: bool, tmp_path: Path
) -> None:
    source, x = Caching(), noise(3, 64)
    if run_before:
        source(x)
    result = Quantizer().fit(x).apply(source)
    assert hasattr(source, "cache") is run_before
    assert result.validate()
    loaded = load_model(result.save(tmp_path / "model.safetensors"), Caching)
    assert same_bits(loaded(x), result.model(x))


@pytest.mark.parametrize("made", [3, None, "model.pt", nn.Linear])
def test_a_factory_that_returns_no_module_is_refused(made: object, tmp_path: Path) -> None:
    path = Quantizer().apply(nn.Linear(64, 64)).save(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"the factory returned a .*, where a module was meant"):
        load_model(path, lambda: made)  # type: ignore[type-var]  # the point


@pytest.mark.parametrize("given", [3, "model.pt", {}])
def test_what_is_neither_a_model_nor_makes_one_is_refused(given: object, tmp_path: Path) -> None:
    path = Quantizer().apply(nn.Linear(64, 64)).save(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"is no model: give a torch\.nn\.Module or a function"):
        load_model(path, given)  # type: ignore[call-overload]  # the point
