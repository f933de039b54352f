"""What is known of inputs, in files: to the bit, and refused where it was changed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mono_quant import CheckpointError, QuantizedLayer, Quantizer, load_model
from tests.helpers import TiedModel, noise, same_bits
from tests.serializers.files import SUFFIXES, Header, assert_same, forge, read, write

each_suffix = pytest.mark.parametrize("suffix", SUFFIXES)


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(8, 16, 3), nn.Flatten(), nn.Linear(64, 16)).eval()


X = noise(5, 8, 6)
SAVED: dict[str, Quantizer] = {
    "dynamic": Quantizer(),
    "dynamic, one grid": Quantizer().activations("dynamic", bits=4, granularity="tensor"),
    "static": Quantizer().fit(X),
    "static, symmetric": Quantizer().activations("static", bits=6, symmetric=True).fit(X),
    "some of them": Quantizer().fit(X).override("0", activations="float"),
}


@each_suffix
@pytest.mark.parametrize("name", SAVED)
def test_inputs_come_back_to_the_bit(name: str, suffix: str, tmp_path: Path) -> None:
    result = SAVED[name].apply(stack())
    path = result.save(tmp_path / f"model{suffix}")
    with torch.device("meta"):
        skeleton = stack()
    loaded = load_model(path, skeleton)
    assert_same(loaded, result.model)
    assert same_bits(loaded(X), result.model(X))
    assert result.validate(X, path=path)
    for layer, other in zip(loaded.modules(), result.model.modules(), strict=True):
        if isinstance(layer, QuantizedLayer):
            assert isinstance(other, QuantizedLayer)
            ours, theirs = layer.activations(), other.activations()
            assert {key: one.scheme for key, one in ours.items()} == {
                key: one.scheme for key, one in theirs.items()
            }
            for key, one in ours.items():
                assert list(one.tensors) == list(theirs[key].tensors)
                assert all(
                    same_bits(one.tensors[part], theirs[key].tensors[part]) for part in one.tensors
                )


@each_suffix
def test_tied_weights_come_back_with_inputs_of_their_own(suffix: str, tmp_path: Path) -> None:
    x = torch.arange(64)
    result = Quantizer().fit(x).apply(TiedModel().eval())
    loaded = load_model(result.save(tmp_path / f"model{suffix}"), TiedModel().eval())
    embedding, head = loaded.embedding, loaded.head
    assert isinstance(embedding, QuantizedLayer)
    assert isinstance(head, QuantizedLayer)
    assert head.quantized_weights["weight"] is embedding.quantized_weights["weight"]
    assert not embedding.activations()
    assert head.activations()["weight"].mode == "static"
    assert same_bits(loaded(x), result.model(x))


@pytest.fixture
def static(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a calibrated model to a file of a suffix."""
    return lambda suffix: Quantizer().fit(X).apply(stack()).save(tmp_path / f"model{suffix}")


@each_suffix
@pytest.mark.parametrize("part", ["input_scale", "input_zero_point"])
def test_a_changed_value_is_noticed(part: str, suffix: str, static: Callable[[str], Path]) -> None:
    path = static(suffix)
    texts, tensors = read(path)
    name = f"0.weight.{part}"
    tensors[name] = tensors[name] + 1
    write(path, texts, tensors)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' was changed: the checksum differs"):
        load_model(path, stack())


def scale_of_two(_: Header, tensors: dict[str, Tensor]) -> None:
    tensors["0.weight.input_scale"] = tensors["0.weight.input_scale"].repeat(2)


def scale_of_whole_numbers(_: Header, tensors: dict[str, Tensor]) -> None:
    tensors["0.weight.input_scale"] = torch.tensor([1], dtype=torch.int32)


def floating_zero_point(_: Header, tensors: dict[str, Tensor]) -> None:
    tensors["0.weight.input_zero_point"] = torch.tensor([1.0])


def activation(header: Header) -> Header:
    records = header["records"]
    assert isinstance(records, dict)
    found: Header = records["0.weight"]["activation"]
    return found


@each_suffix
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (scale_of_two, r"the input's scale of '0\.weight' is \(2,\) of torch\.float32"),
        (scale_of_whole_numbers, r"the input's scale of '0\.weight' is \(1,\) of torch\.int32"),
        (floating_zero_point, r"the input's zero_point of '0\.weight' is \(1,\) of torch\.float32"),
        (lambda header, _: activation(header).update(tensors=["zero_point"]), "has zero_point"),
        (lambda header, _: activation(header).update(tensors=["ghost"]), "input_ghost"),
        (lambda header, _: activation(header).update(scheme={"kind": "ghost"}), "ghost"),
        (lambda header, _: activation(header).update(scheme=None), "a mapping was expected"),
    ],
    ids=["two scales", "int scale", "float zero point", "no scale", "ghost", "kind", "no scheme"],
)
def test_what_does_not_fit_is_refused_though_its_checksum_is_right(
    edit: Callable[[Header, dict[str, Tensor]], object],
    message: str,
    suffix: str,
    static: Callable[[str], Path],
) -> None:
    path = static(suffix)
    forge(path, edit)
    with pytest.raises(CheckpointError, match=message):
        load_model(path, stack())
