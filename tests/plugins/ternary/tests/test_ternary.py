"""What the author of the distribution tests: the laws, and one run from end to end."""

import subprocess
import sys
from pathlib import Path

import torch
from monoquant_ternary import Deviation, Ternary
from torch import nn

from mono_quant import PerGroup, Quantizer, load_model
from mono_quant.testing import Check, parametrize_with_checks


@parametrize_with_checks([Ternary(), Ternary(PerGroup(8)), Deviation(), Deviation(1.25)])
def test_the_laws_are_kept(check: Check) -> None:
    check()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8)).eval()


def test_a_model_is_quantized_saved_and_loaded_by_importing_alone(tmp_path: Path) -> None:
    model, x = network(), torch.randn(16, 128)
    quantizer = Quantizer().scheme(Ternary()).observer(Deviation())
    result = quantizer.fit(x).apply(model)
    path = result.save(tmp_path / "ternary.safetensors")
    assert torch.equal(load_model(path, network())(x), result.model(x))
    assert "ternary per-channel" in str(result.report)
    assert repr(Quantizer.from_config(quantizer.to_config())) == repr(quantizer)


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "float.pt")
    command = [sys.executable, "-m", "mono_quant", "quantize", "float.pt", "--import"]
    command += ["monoquant_ternary", "--scheme", "ternary", "--observer", "deviation:times=1.5"]
    done = subprocess.run(
        [*command, "-o", "small.pt"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ternary per-channel" in done.stdout
