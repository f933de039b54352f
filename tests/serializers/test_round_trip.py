"""What is saved comes back, to the bit."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mono_quant import (
    Affine,
    FittedCodebook,
    FloatCast,
    Microscaling,
    PerGroup,
    PerTensor,
    QTensor,
    QuantizedLayer,
    Quantizer,
    dequantize_model,
    load_model,
    save_model,
)
from tests.helpers import GRIDS, TiedModel, same_bits, same_tensors
from tests.serializers.files import MODELS, SUFFIXES, assert_same, read, small

Make = Callable[[], tuple[nn.Module, Tensor]]
each_suffix = pytest.mark.parametrize("suffix", SUFFIXES)
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
MORE = {
    **GRIDS,
    "2-bit": Quantizer().bits(2).group_size(4),
    "5-bit": Quantizer().bits(5).symmetric(),
    "7-bit": Quantizer().bits(7).granularity("tensor"),
    "float32 scales": Quantizer().bits(4).scale_dtype(torch.float32),
    "bfloat16 scales": Quantizer().scale_dtype(torch.bfloat16),
    "8-bit, float zero points": Quantizer().float_zero_point(),
    "float zero points, per tensor": Quantizer().bits(3).granularity("tensor").float_zero_point(),
    "float zero points, float32": Quantizer().bits(5).float_zero_point().scale_dtype(torch.float32),
    "bfloat16": Quantizer().scheme(FloatCast(torch.bfloat16)),
    "MXFP4": Quantizer().scheme(Microscaling.mxfp4()),
    "MXFP8": Quantizer().scheme(Microscaling.mxfp8()),
    "NVFP4": Quantizer().scheme(Microscaling.nvfp4()),
    "fitted, 8-bit scales": Quantizer().scheme(FittedCodebook(4, PerGroup(8), torch.float8_e4m3fn)),
    "per tensor": Quantizer().scheme(Affine(6, symmetric=False, granularity=PerTensor())),
}


@each_suffix
@each_model
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_loaded_model_is_the_saved_one(
    make: Make, suffix: str, bits: int, tmp_path: Path
) -> None:
    source, x = make()
    result = Quantizer().bits(bits).only("*").apply(source.eval())
    path = result.save(tmp_path / f"model{suffix}")
    loaded = load_model(path, make()[0].eval())
    assert_same(loaded, result.model)
    assert same_bits(loaded(x), result.model(x))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("grid", MORE.values(), ids=MORE)
def test_every_grid_comes_back(grid: Quantizer, suffix: str, tmp_path: Path) -> None:
    result = grid.only("*").apply(TiedModel())
    path = result.save(tmp_path / f"model{suffix}")
    assert_same(load_model(path, TiedModel()), result.model)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_a_path_may_be_text(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().apply(small())
    path = result.save(os.fspath(tmp_path / f"model{suffix}"))
    assert path == tmp_path / f"model{suffix}"
    assert_same(load_model(os.fspath(path), small()), result.model)


@each_suffix
def test_save_model_writes_the_same_tensors(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().apply(small())
    one = result.save(tmp_path / f"one{suffix}")
    other = save_model(result.model, tmp_path / f"other{suffix}")
    assert_same(load_model(one, small()), load_model(other, small()))


@each_suffix
@each_model
def test_a_saved_model_can_be_saved_again(make: Make, suffix: str, tmp_path: Path) -> None:
    result = Quantizer().only("*").apply(make()[0].eval())
    first = load_model(result.save(tmp_path / f"one{suffix}"), make()[0].eval())
    second = load_model(save_model(first, tmp_path / f"two{suffix}"), make()[0].eval())
    assert_same(first, second)


@each_suffix
def test_a_file_may_be_written_over_the_one_it_was_loaded_from(suffix: str, tmp_path: Path) -> None:
    path = Quantizer().apply(small()).save(tmp_path / f"model{suffix}")
    loaded = load_model(path, small())
    save_model(loaded, path)
    assert_same(load_model(path, small()), loaded)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    source = small()
    for suffix in SUFFIXES:
        one, other = (
            Quantizer().bits(4).apply(source).save(tmp_path / name / f"model{suffix}").read_bytes()
            for name in map(_folder(tmp_path), ("a", "b"))
        )
        assert one == other


def _folder(parent: Path) -> Callable[[str], str]:
    def make(name: str) -> str:
        (parent / name).mkdir(exist_ok=True)
        return name

    return make


@each_suffix
def test_tied_weights_are_stored_once_and_stay_tied(suffix: str, tmp_path: Path) -> None:
    quantizer = Quantizer().bits(4).only("*")
    tied, apart = TiedModel(), TiedModel()
    apart.head.weight = nn.Parameter(torch.randn(64, 64))
    tied_path = quantizer.apply(tied).save(tmp_path / f"tied{suffix}")
    apart_path = quantizer.apply(apart).save(tmp_path / f"apart{suffix}")
    saved = apart_path.stat().st_size - tied_path.stat().st_size
    assert saved > 64 * 64 // 2
    loaded = load_model(tied_path, TiedModel())
    assert isinstance(loaded.embedding, QuantizedLayer)
    assert isinstance(loaded.head, QuantizedLayer)
    assert loaded.head.quantized_weights["weight"] is loaded.embedding.quantized_weights["weight"]


@each_suffix
def test_tied_float_weights_are_stored_once_and_stay_tied(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().bits(4).only("middle").apply(TiedModel())
    path = result.save(tmp_path / f"model{suffix}")
    _, tensors = read(path)
    assert len({"embedding.weight", "head.weight"} & set(tensors)) == 1
    loaded = load_model(path, TiedModel())
    assert loaded.head.weight is loaded.embedding.weight
    assert_same(loaded, result.model)


@each_suffix
@each_model
@pytest.mark.parametrize("bits", [3, 8])
def test_the_report_counts_the_bytes_of_the_tensors_of_the_file(
    make: Make, suffix: str, bits: int, tmp_path: Path
) -> None:
    result = Quantizer().bits(bits).only("*").apply(make()[0])
    _, tensors = read(result.save(tmp_path / f"model{suffix}"))
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert result.report.bytes == stored


@each_suffix
def test_the_dtype_of_the_float_weights_is_kept(suffix: str, tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(64, 64).half(), nn.Linear(64, 8).double())
    path = Quantizer().apply(source).save(tmp_path / f"model{suffix}")
    loaded = load_model(path, nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)))
    assert loaded[0](torch.randn(1, 64).half()).dtype == torch.float16
    assert loaded[1](torch.randn(1, 64).double()).dtype == torch.float64
    assert {tensor.dtype for tensor in loaded[0].parameters()} == {torch.float16}


@each_suffix
def test_mode_and_gradients_are_the_skeletons(suffix: str, tmp_path: Path) -> None:
    path = Quantizer().apply(small()).save(tmp_path / f"model{suffix}")
    skeleton = small().train()
    skeleton[0].requires_grad_(False)
    loaded = load_model(path, skeleton)
    assert loaded is skeleton
    assert loaded.training
    assert not loaded[0].bias.requires_grad
    assert loaded[2].bias.requires_grad


SKELETONS: dict[str, Callable[[], nn.Sequential | Callable[[], nn.Sequential]]] = {
    "float": small,
    "meta": lambda: _on_meta(),  # noqa: PLW0108  # defined below
    "factory": lambda: small,
    "meta factory": lambda: _on_meta,
}


def _on_meta() -> nn.Sequential:
    with torch.device("meta"):
        return small()


@each_suffix
@pytest.mark.parametrize("skeleton", SKELETONS.values(), ids=SKELETONS)
@pytest.mark.parametrize("bits", [4, 16])
def test_skeletons_of_every_kind_are_filled(
    skeleton: Callable[[], nn.Sequential], bits: int, suffix: str, tmp_path: Path
) -> None:
    result = Quantizer().bits(bits).only("*").apply(small())
    loaded = load_model(result.save(tmp_path / f"model{suffix}"), skeleton())
    assert_same(loaded, result.model)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    x = torch.randn(3, 64)
    assert same_bits(loaded(x), result.model(x))


@each_suffix
@each_model
def test_models_with_ties_and_buffers_fill_meta_skeletons(
    make: Make, suffix: str, tmp_path: Path
) -> None:
    source, x = make()
    result = Quantizer().only("*").apply(source.eval())
    with torch.device("meta"):
        skeleton = make()[0].eval()
    loaded = load_model(result.save(tmp_path / f"model{suffix}"), skeleton)
    assert_same(loaded, result.model)
    assert same_bits(loaded(x), result.model(x))


@each_suffix
def test_a_class_is_a_factory(suffix: str, tmp_path: Path) -> None:
    path = Quantizer().apply(TiedModel()).save(tmp_path / f"model{suffix}")
    assert isinstance(load_model(path, TiedModel).middle, QuantizedLayer)


@each_suffix
def test_without_a_model_there_is_a_dictionary(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().bits(4).only("*").apply(TiedModel())
    found = load_model(result.save(tmp_path / f"model{suffix}"))
    quantized = {"embedding.weight", "middle.weight", "head.weight"}
    assert set(found) == quantized | {"middle.bias", "norm.weight", "norm.bias"}
    for name in quantized:
        layer = result.model.get_submodule(name.rpartition(".")[0])
        assert isinstance(layer, QuantizedLayer)
        q, expected = found[name], layer.qtensors()["weight"]
        assert isinstance(q, QTensor)
        assert same_bits(q.codes, expected.codes)
        assert q.qparams.scale is not None
        assert expected.qparams.scale is not None
        assert same_bits(q.qparams.scale, expected.qparams.scale)
    bias = found["middle.bias"]
    assert isinstance(bias, Tensor)
    assert same_bits(bias, result.model.middle.bias)


def test_the_safetensors_library_reads_our_file(tmp_path: Path) -> None:
    result = Quantizer().bits(4).only("*").apply(TiedModel())
    path = result.save(tmp_path / "model.safetensors")
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        parts = {"codes", "scale", "zero_point"}
        assert names == {
            *(f"{layer}.weight.{part}" for layer in ("embedding", "middle") for part in parts),
            *("middle.bias", "norm.weight", "norm.bias"),
        }
        state = result.model.state_dict()
        for name in names:
            layer, _, part = name.rpartition(".weight.")
            key = f"{layer}.quantized_weights.weight.{part}" if part in parts else name
            assert same_bits(file.get_tensor(name), state[key])


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_torch_reads_our_file_without_running_code(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().bits(4).apply(small())
    path = result.save(tmp_path / f"model{suffix}")
    content = torch.load(path, weights_only=True)
    assert {type(value) for value in content.values()} == {str, dict}
    layer = result.model[0]
    assert isinstance(layer, QuantizedLayer)
    codes = layer.packed_weights()["weight"].tensors["codes"]
    assert same_bits(content["tensors"]["0.weight.codes"], codes)


@each_suffix
def test_a_model_that_was_moved_is_saved_as_it_is_now(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().apply(small())
    result.model.to(torch.bfloat16)
    loaded = load_model(result.save(tmp_path / f"model{suffix}"), small())
    assert_same(loaded, result.model)
    assert loaded[0].bias.dtype == torch.bfloat16


@each_suffix
def test_a_loaded_model_dequantizes_as_the_saved_one_does(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().bits(4).apply(TiedModel())
    path = result.save(tmp_path / f"model{suffix}")
    again = dequantize_model(load_model(path, TiedModel()))
    assert same_tensors(again, result.dequantize())


def test_safetensors_says_which_dtype_it_lacks_and_pt_holds_it(tmp_path: Path) -> None:
    source = small()
    source.register_buffer("phase", torch.randn(3, dtype=torch.complex128))
    result = Quantizer().apply(source)
    with pytest.raises(ValueError, match=r"complex128.*'phase'; save as \.pt"):
        result.save(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    path = result.save(tmp_path / "model.pt")
    skeleton = small()
    skeleton.register_buffer("phase", torch.zeros(3, dtype=torch.complex128))
    assert_same(load_model(path, skeleton), result.model)
    assert result.validate(torch.randn(2, 64))
