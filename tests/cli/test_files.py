"""``info``, ``validate``, ``compare`` and ``dequantize``: what is done with files."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mono_quant import QuantizedModule, Quantizer, load_model, read_state_dict
from tests.cli.conftest import SMALL, TIED, Monoquant, write
from tests.cli.networks import Tied, small

FILES = ("small.safetensors", "small.pt")


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest, folder: Path) -> str:
    """Return the name of a quantized file in the current folder."""
    name = str(request.param)
    (folder / name).parent.mkdir(exist_ok=True)
    result = Quantizer().bits(4).override("2", bits=8).apply(small())
    result.save(folder / name)
    return name


def on_grid() -> dict[str, Tensor]:
    """Return the float state dict that the file stands for."""
    return Quantizer().bits(4).override("2", bits=8).apply(small()).dequantize().state_dict()


def decibels(reference: Tensor, other: Tensor) -> float:
    reference, other = reference.double(), other.double()
    noise = (reference - other).square().sum()
    return 10 * torch.log10(reference.square().sum() / noise).item()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.rindex(small().state_dict()["2.bias"].numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_info_shows_every_weight_and_where_it_comes_from(
    file: str, folder: Path, monoquant: Monoquant
) -> None:
    done = monoquant("info", file)
    assert (done.code, done.err) == (0, "")
    assert "format version 1" in done.out
    assert "4-bit asymmetric per-group 64" in done.out
    assert "8-bit symmetric per-channel" in done.out
    said = monoquant("info", file, "--json").json
    assert said["format_version"] == 1
    assert said["file_bytes"] == (folder / file).stat().st_size
    assert said["config"] == Quantizer().bits(4).override("2", bits=8).to_config()
    assert said["float_tensors"] == 2
    assert said["float_tensor_bytes"] == 4 * (128 + 10)
    weights = said["weights"]
    assert isinstance(weights, list)
    groups = 128 * 64 // 64
    assert [weight["bytes"] for weight in weights if isinstance(weight, dict)] == [
        128 * 64 // 2 + 2 * groups + groups // 2,
        10 * 128 + 2 * 10,
    ]


def test_info_says_changes_in_words(folder: Path, monoquant: Monoquant) -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8)).eval()
    Quantizer().apply(model).save(folder / "folded.pt")
    assert "changes: 1 is folded into 0\n" in monoquant("info", "folded.pt").out


def test_info_reads_no_tensor(folder: Path, monoquant: Monoquant) -> None:
    Quantizer().apply(small()).save("small.safetensors")
    damage(folder / "small.safetensors")
    assert monoquant("info", "small.safetensors").code == 0


def test_info_counts_a_tied_weight_once(folder: Path, monoquant: Monoquant) -> None:
    Quantizer().apply(Tied()).save("tied-small.pt")
    assert (
        "8-bit symmetric per-channel; tied to table.weight"
        in monoquant("info", "tied-small.pt").out
    )
    weights = monoquant("info", "tied-small.pt", "--json").json["weights"]
    assert isinstance(weights, list)
    sizes = [weight["bytes"] for weight in weights if isinstance(weight, dict)]
    assert sorted(sizes, key=str) == [0, 96 * 64 + 2 * 96]


def test_validate_without_a_model_reloads(file: str, monoquant: Monoquant) -> None:
    done = monoquant("validate", file)
    assert done.code == 0
    assert done.out.startswith("reloaded, not run\n")
    assert monoquant("validate", file, "--json").json["status"] == "reloaded, not run"


def test_validate_with_a_model_and_no_example_does_not_run(file: str, monoquant: Monoquant) -> None:
    done = monoquant("validate", file, "--factory", SMALL)
    assert (done.code, done.out.splitlines()[0]) == (0, "reloaded, not run")


@pytest.mark.parametrize("example", ["batch.safetensors", "batches.pt"])
def test_validate_with_a_model_and_an_example_runs(
    example: str, file: str, monoquant: Monoquant
) -> None:
    done = monoquant("validate", file, "--factory", SMALL, "--example", example, "--json")
    assert done.code == 0
    assert done.json["status"] == "valid"


def test_validate_calls_the_model_as_it_is_told(file: str, monoquant: Monoquant) -> None:
    done = monoquant(
        "validate", file, "--factory", SMALL, "--example", "named.pt",
        "--forward", "tests.cli.networks:doubled",
    )  # fmt: skip
    assert (done.code, done.out.splitlines()[0]) == (0, "valid")


def test_a_changed_byte_fails_validation(file: str, folder: Path, monoquant: Monoquant) -> None:
    damage(folder / file)
    done = monoquant("validate", file, "--json")
    assert done.code == 1
    assert json.loads(done.out)["status"] == "failed"
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("factory", ["narrow", "deeper", "Tied"])
def test_a_file_of_another_architecture_fails_validation(
    factory: str, file: str, monoquant: Monoquant
) -> None:
    done = monoquant("validate", file, "--factory", f"tests.cli.networks:{factory}")
    assert done.code == 1
    assert done.out.startswith("failed\n")


def test_a_truncated_file_fails_validation(file: str, folder: Path, monoquant: Monoquant) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    assert monoquant("validate", file).code == 1
    assert monoquant("info", file).code == 2


@pytest.mark.parametrize("reference", ["model.pt", "model.safetensors"])
def test_compare_measures_each_weight(reference: str, file: str, monoquant: Monoquant) -> None:
    done = monoquant("compare", reference, file, "--json")
    assert done.code == 0
    said = done.json
    float_state, others = small().state_dict(), on_grid()
    rows = said["tensors"]
    assert isinstance(rows, list)
    assert said["equal"] == 2  # the biases
    for row in rows:
        assert isinstance(row, dict)
        name = str(row["name"])
        wanted = decibels(float_state[name], others[name])
        assert row["sqnr_db"] == pytest.approx(wanted, abs=1e-3)
    assert said["reference_bytes"] == 4 * (128 * 64 + 128 + 10 * 128 + 10)
    assert said["output_sqnr_db"] is None


def test_compare_measures_the_output(file: str, monoquant: Monoquant) -> None:
    words = ("--factory", SMALL, "--calibration", "batches.pt")
    done = monoquant("compare", "model.pt", file, *words)
    model, other = small(), small()
    other.load_state_dict(on_grid())
    batches = torch.cat(torch.load("batches.pt", weights_only=True))
    with torch.no_grad():
        wanted = decibels(model(batches), other(batches))
    assert f"output SQNR {wanted:.1f} dB on 64 samples" in done.out
    said = monoquant("compare", "model.pt", file, *words, "--samples", 16, "--json").json
    assert said["samples"] == 16


def test_compare_takes_two_quantized_files(file: str, monoquant: Monoquant) -> None:
    done = monoquant(
        "compare", file, file, "--factory", SMALL, "--calibration", "batches.pt", "--json"
    )
    rows = done.json["tensors"]
    assert isinstance(rows, list)
    assert [row["sqnr_db"] for row in rows if isinstance(row, dict)] == ["inf", "inf"]
    assert done.json["output_sqnr_db"] == "inf"


def test_compare_names_what_only_one_has(folder: Path, monoquant: Monoquant) -> None:
    state = small().state_dict()
    write({"0.weight": state["0.weight"], "0.bias": state["0.bias"][:5], "3.weight": state["2.weight"]}, "other.safetensors")  # fmt: skip  # noqa: E501
    said = monoquant("compare", "model.pt", "other.safetensors", "--json").json
    assert said["missing"] == ["2.bias", "2.weight"]
    assert said["added"] == ["3.weight"]
    shown = monoquant("compare", "model.pt", "other.safetensors").out
    assert "shapes differ" in shown
    assert "missing: 2.bias" in shown


def test_compare_sees_the_imaginary_part(folder: Path, monoquant: Monoquant) -> None:
    one = torch.complex(torch.ones(8), torch.full((8,), 3.0))
    other = torch.complex(torch.ones(8), torch.full((8,), 2.0))
    torch.save({"spectrum": one}, "one.pt")
    torch.save({"spectrum": other}, "other.pt")
    rows = monoquant("compare", "one.pt", "other.pt", "--json").json["tensors"]
    assert isinstance(rows, list)
    assert [row["sqnr_db"] for row in rows if isinstance(row, dict)] == [pytest.approx(10.0)]


def test_compare_counts_a_tied_weight_once(folder: Path, monoquant: Monoquant) -> None:
    torch.save(Tied().state_dict(), "tied.pt")
    Quantizer().apply(Tied()).save("tied-small.pt")
    said = monoquant("compare", "tied.pt", "tied-small.pt", "--json").json
    assert (said["reference_bytes"], said["bytes"]) == (4 * 96 * 64, 96 * 64 + 2 * 96)


def test_a_file_of_which_nothing_is_quantized_is_run_too(
    folder: Path, monoquant: Monoquant
) -> None:
    model = small()
    model.register_buffer("positions", torch.arange(4), persistent=False)
    Quantizer().skip("*").apply(model).save("kept.pt")
    words = ("--factory", SMALL, "--calibration", "batches.pt")
    assert monoquant("compare", "model.pt", "kept.pt", *words).code == 0


def test_compare_says_larger_where_it_is(file: str, monoquant: Monoquant) -> None:
    assert "times larger" in monoquant("compare", file, "model.pt").out


@pytest.mark.parametrize("output", ["float.safetensors", "float.pt", "float.pth"])
def test_dequantize_writes_the_float_state_dict(
    output: str, file: str, folder: Path, monoquant: Monoquant
) -> None:
    done = monoquant("dequantize", file, "-o", output, "--json")
    assert (done.code, done.json["tensors"]) == (0, 4)
    found, wanted = read_state_dict(folder / output), on_grid()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    small().load_state_dict(found)


def test_dequantize_leaves_no_other_file(file: str, folder: Path, monoquant: Monoquant) -> None:
    before = {path.name for path in folder.iterdir()}
    assert monoquant("dequantize", file, "-o", "float.pt", "--quiet").out == ""
    assert {path.name for path in folder.iterdir()} - before == {"float.pt"}


@pytest.mark.parametrize("output", ["float.safetensors", "float.pt"])
def test_dequantize_writes_all_names_of_a_tie(
    output: str, folder: Path, monoquant: Monoquant
) -> None:
    result = Quantizer().apply(Tied())
    result.save("tied-small.safetensors")
    assert monoquant("dequantize", "tied-small.safetensors", "-o", output).code == 0
    model = Tied()
    model.load_state_dict(read_state_dict(folder / output))
    assert torch.equal(model.head.weight, result.dequantize().head.weight)


def test_dequantize_leaves_out_what_a_state_dict_leaves_out(
    folder: Path, monoquant: Monoquant
) -> None:
    class Positions(nn.Linear):
        def __init__(self) -> None:
            super().__init__(64, 10)
            self.register_buffer("positions", torch.arange(10), persistent=False)

    Quantizer().apply(Positions()).save("positions.pt")
    assert monoquant("dequantize", "positions.pt", "-o", "float.pt").code == 0
    Positions().load_state_dict(read_state_dict(folder / "float.pt"))


def test_a_bare_file_loads_into_its_model(folder: Path, monoquant: Monoquant) -> None:
    assert monoquant("quantize", "model.pt", "-o", "small.pt").code == 0
    done = monoquant("validate", "small.pt", "--factory", SMALL, "--example", "batches.pt")
    assert (done.code, done.out.splitlines()[0]) == (0, "valid")
    assert isinstance(load_model("small.pt", small()).get_submodule("0"), QuantizedModule)


def test_the_tied_file_is_valid(folder: Path, monoquant: Monoquant) -> None:
    Quantizer().apply(Tied()).save("tied-small.pt")
    done = monoquant(
        "validate", "tied-small.pt", "--factory", TIED, "--example", "tied-batch.safetensors"
    )
    assert (done.code, done.out.splitlines()[0]) == (0, "valid")


def test_benchmark_runs_the_file_beside_the_float_model(file: str, monoquant: Monoquant) -> None:
    words = ("benchmark", file, "--factory", SMALL, "--example", "batches.pt", "--seconds", "0")
    done = monoquant(*words)
    assert done.code == 0
    assert "float" in done.out
    assert "median of 5 by turns" in done.out
    found = monoquant(*words, "--json").json
    assert found["rounds"] == 5
    assert isinstance(found["kernels"], dict)
    assert found["kernels"]


def test_benchmark_needs_a_model_and_an_example(file: str, monoquant: Monoquant) -> None:
    for words in ((), ("--factory", SMALL)):
        done = monoquant("benchmark", file, *words)
        assert done.code == 2
        assert "--example FILE" in done.err


def test_types_that_torch_does_not_compare_are_compared(folder: Path, monoquant: Monoquant) -> None:
    value = torch.tensor([1.0, 2.0])
    torch.save({"x": value, "y": value}, "one.pt")
    torch.save({"x": value.to(torch.float8_e5m2), "y": 1.5 * value}, "other.pt")
    done = monoquant("compare", "one.pt", "other.pt")
    assert done.code == 0
    assert "1 tensors compared, 1 more are equal" in done.out
