"""``monoquant quantize``: what comes in, what comes out."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mono_quant import QuantizationResult, QuantizedModule, Quantizer, Validation, load_model
from tests.cli.conftest import SMALL, TIED, Monoquant
from tests.cli.networks import Tied, small, training
from tests.helpers import same_tensors

GROUPS = 128 * 64 // 64 + 10 * 128 // 64
FOUR_BIT_BYTES = (128 * 64 + 10 * 128) // 2 + 2 * GROUPS + GROUPS // 2


def expected(quantizer: Quantizer) -> nn.Module:
    return quantizer.apply(small()).model


@pytest.mark.parametrize("model", ["model.pt", "model.safetensors", "training.pt"])
@pytest.mark.parametrize("output", ["small.pt", "small.pth", "small.safetensors"])
def test_a_checkpoint_of_any_format_becomes_one_of_any_format(
    model: str, output: str, folder: Path, monoquant: Monoquant
) -> None:
    done = monoquant("quantize", "--model", model, "--bits", 4, "-o", output)
    assert (done.code, done.err) == (0, "")
    assert same_tensors(load_model(output, small()), expected(Quantizer().bits(4)))


def test_the_command_of_the_requirements_works(folder: Path, monoquant: Monoquant) -> None:
    done = monoquant("quantize", "--model", "model.pt", "--bits", 8, "--dynamic", "-o", "s.pt")
    assert done.code == 0
    fate = "8-bit symmetric per-channel; float inputs: a state dict does not say what reads it"
    assert done.out.count(fate) == 2
    assert same_tensors(load_model("s.pt", small()), expected(Quantizer().bits(8)))


def test_the_report_counts_codes_scales_and_zero_points(folder: Path, monoquant: Monoquant) -> None:
    done = monoquant("quantize", "model.pt", "--bits", 4, "-o", "s.safetensors", "--json")
    report = done.json["report"]
    assert isinstance(report, dict)
    assert report["float_bytes"] == 4 * (128 * 64 + 128 + 10 * 128 + 10)
    assert report["bytes"] == FOUR_BIT_BYTES + 4 * (128 + 10)
    assert done.json["file_bytes"] == (folder / "s.safetensors").stat().st_size


def test_a_model_with_data_is_measured_and_validated(folder: Path, monoquant: Monoquant) -> None:
    done = monoquant(
        "quantize", "model.pt", "--factory", SMALL, "--calibration", "batches.pt",
        "-o", "s.pt", "--json",
    )  # fmt: skip
    report, validation = done.json["report"], done.json["validation"]
    assert isinstance(report, dict)
    assert isinstance(validation, dict)
    assert report["samples"] == 64
    assert validation["status"] == "valid"
    model, loaded = small(), load_model("s.pt", small())
    with torch.no_grad():
        batches = torch.load("batches.pt", weights_only=True)
        floats = torch.cat([model(batch) for batch in batches]).double()
        others = torch.cat([loaded(batch) for batch in batches]).double()
    noise = (floats - others).square().sum()
    decibels = 10 * torch.log10(floats.square().sum() / noise).item()
    assert report["output_sqnr_db"] == pytest.approx(decibels, abs=0.01)


def test_a_model_is_measured_on_other_data(folder: Path, monoquant: Monoquant) -> None:
    batches = torch.load("batches.pt", weights_only=True)
    torch.save([3 * batches[0]], "apart.pt")
    common = ("--factory", SMALL, "--measure-on", "apart.pt", "--json")
    both = monoquant("quantize", *common, "--calibration", "batches.pt", "-o", "s.pt")
    alone = monoquant("quantize", *common, "-o", "t.pt")
    static, dynamic = both.json["report"], alone.json["report"]
    assert isinstance(static, dict)
    assert isinstance(dynamic, dict)
    assert static["samples"] == dynamic["samples"] == len(batches[0])
    assert static["output_sqnr_db"] < dynamic["output_sqnr_db"]  # its ranges are of quieter data
    bare = monoquant("quantize", "model.pt", "--measure-on", "apart.pt", "-o", "u.pt")
    assert bare.code == 2
    assert "--measure-on runs the model" in bare.err


def test_samples_end_the_data_early(folder: Path, monoquant: Monoquant) -> None:
    done = monoquant(
        "quantize", "--factory", SMALL, "--calibration", "batches.pt", "--samples", 17,
        "-o", "s.pt", "--json",
    )  # fmt: skip
    report = done.json["report"]
    assert isinstance(report, dict)
    assert report["samples"] == 32  # the batch that reaches them is still used


@pytest.mark.parametrize("data", ["batch.safetensors", "batches.pt"])
def test_a_single_tensor_is_positional(data: str, folder: Path, monoquant: Monoquant) -> None:
    done = monoquant("quantize", "--factory", SMALL, "--calibration", data, "-o", "s.pt")
    assert done.code == 0
    assert "validation: valid" in done.out


def test_several_tensors_of_a_file_are_keyword_arguments(
    folder: Path, monoquant: Monoquant
) -> None:
    done = monoquant(
        "quantize", "tied.safetensors", "--factory", TIED,
        "--calibration", "tied-batch.safetensors", "-o", "s.safetensors",
    )  # fmt: skip
    assert done.code == 0
    assert "validation: valid" in done.out


def test_a_checkpoint_without_the_second_name_of_a_tie_fits(
    folder: Path, monoquant: Monoquant
) -> None:
    assert monoquant("quantize", "tied.safetensors", "--factory", TIED, "-o", "s.pt").code == 0
    loaded = load_model("s.pt", Tied())
    state = loaded.state_dict()
    codes = [tensor for name, tensor in state.items() if name.endswith(".codes")]
    assert len(codes) == 2
    assert codes[0].data_ptr() == codes[1].data_ptr()


def test_forward_says_how_the_model_is_called(folder: Path, monoquant: Monoquant) -> None:
    done = monoquant(
        "quantize", "--factory", SMALL, "--calibration", "named.pt",
        "--forward", "tests.cli.networks:doubled", "-o", "s.pt",
    )  # fmt: skip
    assert done.code == 0
    assert "validation: valid" in done.out


def test_without_a_file_the_factory_brings_the_weights(folder: Path, monoquant: Monoquant) -> None:
    assert monoquant("quantize", "--factory", SMALL, "-o", "s.pt").code == 0
    assert same_tensors(load_model("s.pt", small()), expected(Quantizer()))


def test_a_factory_is_also_looked_for_in_this_folder(folder: Path, monoquant: Monoquant) -> None:
    code = "from tests.cli.networks import small\n\n\nclass Nets:\n    make = staticmethod(small)\n"
    (folder / "only_in_this_folder.py").write_text(code)
    sys.modules.pop("only_in_this_folder", None)
    made = "only_in_this_folder:Nets.make"
    assert monoquant("quantize", "model.pt", "--factory", made, "-o", "s.pt").code == 0


@pytest.mark.parametrize("model", ["whole.pt", "inside.pt"])
def test_a_trusted_pickle_is_a_model(model: str, folder: Path, monoquant: Monoquant) -> None:
    done = monoquant(
        "quantize", model, "--trust-pickle", "--calibration", "batches.pt", "-o", "s.pt"
    )
    assert done.code == 0
    assert "validation: valid" in done.out
    batches = torch.load("batches.pt", weights_only=True)
    assert same_tensors(load_model("s.pt", small()), expected(Quantizer().fit(batches)))


def test_dynamic_inputs_of_a_whole_model_are_reported_and_saved(
    folder: Path, monoquant: Monoquant
) -> None:
    done = monoquant("quantize", "--factory", SMALL, "--dynamic", "-o", "s.pt")
    assert done.code == 0
    fate = "8-bit symmetric per-channel; dynamic 8-bit asymmetric per-token inputs"
    assert done.out.count(fate) == 2
    loaded = load_model("s.pt", small())
    modes = [
        activation.mode
        for layer in loaded.modules()
        if isinstance(layer, QuantizedModule)
        for activation in layer.activations().values()
    ]
    assert modes == ["dynamic"] * 2


@pytest.mark.parametrize("model", ["model.pt", "whole.pt"])
def test_a_trusted_pickle_may_hold_no_code(model: str, folder: Path, monoquant: Monoquant) -> None:
    done = monoquant("quantize", model, "--trust-pickle", "--factory", SMALL, "-o", "s.pt")
    assert done.code == 0


def test_in_place_writes_the_same_file(folder: Path, monoquant: Monoquant) -> None:
    common = ("--factory", SMALL, "--bits", 4, "--calibration", "batches.pt", "--quiet")
    assert monoquant("quantize", "model.pt", *common, "-o", "a.safetensors").code == 0
    assert monoquant("quantize", "model.pt", *common, "--in-place", "-o", "b.safetensors").code == 0
    one, other = (load_model(name, small()) for name in ("a.safetensors", "b.safetensors"))
    assert same_tensors(one, other)


def test_a_plan_writes_nothing(folder: Path, monoquant: Monoquant) -> None:
    before = sorted(folder.iterdir())
    done = monoquant("plan", "model.pt", "--bits", 4, "--skip", "2")
    assert done.code == 0
    assert "4-bit asymmetric per-group 64" in done.out
    assert "float: skipped" in done.out
    assert sorted(folder.iterdir()) == before
    shown = monoquant("plan", "model.pt", "--bits", 4, "--json").json
    assert {"plan", "peak_bytes", "peak_bytes_in_place", "time", "config"} == set(shown)


def test_quiet_says_nothing(folder: Path, monoquant: Monoquant) -> None:
    done = monoquant("quantize", "model.pt", "-o", "s.pt", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_json_is_all_that_is_on_stdout(folder: Path, monoquant: Monoquant) -> None:
    done = monoquant(
        "quantize", "--factory", "tests.cli.networks:talkative", "-o", "s.pt", "--json"
    )
    assert done.json["output"] == "s.pt"
    assert "making a model" in done.err


def test_without_validation_none_is_shown(folder: Path, monoquant: Monoquant) -> None:
    done = monoquant("quantize", "model.pt", "-o", "s.pt", "--no-validate", "--json")
    assert "validation" not in done.json
    assert load_model("s.pt")


def test_a_failed_validation_is_told_and_has_its_exit_code(
    folder: Path, monoquant: Monoquant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Validation:
        return Validation("failed", (("reloaded", "0.weight differs"),))

    monkeypatch.setattr(QuantizationResult, "validate", fail)
    done = monoquant("quantize", "model.pt", "-o", "s.pt", "--json")
    assert done.code == 1
    assert done.err == "monoquant: error: s.pt failed validation: reloaded: 0.weight differs\n"
    assert json.loads(done.out)["validation"]["status"] == "failed"


def test_what_is_validated_is_the_file_that_was_written(
    folder: Path, monoquant: Monoquant, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = QuantizationResult.save

    def save_badly(self: QuantizationResult[nn.Module], path: Path) -> Path:
        saved = save(self, path)
        content = bytearray(saved.read_bytes())
        content[-100] ^= 1
        saved.write_bytes(content)
        return saved

    monkeypatch.setattr(QuantizationResult, "save", save_badly)
    done = monoquant("quantize", "model.pt", "-o", "s.safetensors", "--quiet")
    assert done.code == 1
    assert "was changed: the checksum differs" in done.complaint


def test_every_module_of_the_output_that_can_be_is_quantized(
    folder: Path, monoquant: Monoquant
) -> None:
    assert monoquant("quantize", "--factory", TIED, "--bits", 8, "-o", "s.pt").code == 0
    loaded = load_model("s.pt", Tied())
    assert sum(isinstance(module, QuantizedModule) for module in loaded.modules()) == 2


def test_samples_without_data_are_refused(folder: Path, monoquant: Monoquant) -> None:
    for count in (0, 10):
        done = monoquant("quantize", "model.pt", "--samples", count, "-o", "s.pt")
        assert done.code == 2
        assert "--samples" in done.complaint or "samples" in done.complaint
    assert not (folder / "s.pt").exists()


def test_a_plan_takes_every_option_that_says_how(folder: Path, monoquant: Monoquant) -> None:
    said = {
        command: set(re.findall(r"--[a-z-]+", monoquant(command, "--help").out))
        for command in ("plan", "quantize")
    }
    kept = {"--output", "--in-place", "--sequential", "--no-sequential", "--resume"}
    kept |= {"--no-validate", "--dump-config", "--html", "--require-coverage", "--require-sqnr"}
    assert said["quantize"] - said["plan"] == kept
    assert monoquant("plan", "model.pt", "-o", "s.pt").code == 2


FASTER = ("--only-if-faster", "--example", "batches.pt")


def test_layers_are_measured_on_an_example(folder: Path, monoquant: Monoquant) -> None:
    words = ("model.pt", "--factory", SMALL, *FASTER)
    done = monoquant("plan", *words)
    assert done.code == 0
    assert "quantized only where that is more than 5% faster on the example" in done.out
    done = monoquant("quantize", *words, "--margin", 1e9, "-o", "s.pt")
    assert (done.code, done.err) == (0, "")
    assert done.out.count("float: no gain in speed, quantized it is") == 2
    assert done.out.endswith("nothing is faster quantized: the file holds the float model\n")
    assert same_tensors(load_model("s.pt", small()), small())


def test_an_example_is_called_as_the_data_is(folder: Path, monoquant: Monoquant) -> None:
    words = ("plan", "--factory", SMALL, "--only-if-faster", "--example", "named.pt")
    assert monoquant(*words).code == 2
    done = monoquant(*words, "--forward", "tests.cli.networks:doubled")
    assert done.code == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (FASTER, "--example runs the model, and a bare checkpoint cannot be run: add --factory"),
        (("--factory", SMALL, "--only-if-faster"), "add --example FILE"),
        (("--factory", SMALL, *FASTER[1:]), "--only-if-faster measures on; add that"),
        (("--factory", SMALL, "--margin", 1), "add --only-if-faster"),
        (("--factory", SMALL, *FASTER, "--margin", -1), "margin is a share of 0 or more"),
        (("--factory", SMALL, *FASTER, "--samples", 9), "add that"),
    ],
    ids=["bare", "example", "faster", "margin", "negative", "samples"],
)
def test_half_of_a_measurement_is_refused(
    words: tuple[object, ...], complaint: str, folder: Path, monoquant: Monoquant
) -> None:
    done = monoquant("plan", "model.pt", *words)
    assert done.code == 2
    assert complaint in done.complaint


def test_what_a_factory_makes_in_train_mode_is_quantized_as_it_will_be_used(
    folder: Path, monoquant: Monoquant
) -> None:
    torch.save(torch.randn(8, 3, 16, 16), "images.pt")
    words = ("plan", "--factory", "tests.cli.networks:training", "--calibration", "images.pt")
    assert "1 is to be folded into 0" in monoquant(*words).out
    model = training()
    torch.save(model.state_dict(), "m.pt")
    torch.save(model, "whole-m.pt")
    assert "1 is to be folded into 0" in monoquant(words[0], "m.pt", *words[1:]).out
    words = ("plan", "whole-m.pt", "--trust-pickle", "--calibration", "images.pt")
    assert "1 is to be folded into 0" in monoquant(*words).out
