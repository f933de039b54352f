"""The same quantizer and model make the same bytes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mono_quant import Quantizer, load_model

MAKE = """
import sys, torch
from torch import nn
from mono_quant import Quantizer
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 64), nn.BatchNorm1d(64))
Quantizer().bits(4).override("0", bits=8).apply(model).save(sys.argv[1])
"""


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_two_processes_write_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in ("one", "two")]
    for path in paths:
        subprocess.run([sys.executable, "-W", "ignore", "-c", MAKE, path], check=True)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_loaded_model_is_saved_with_the_same_tensors(suffix: str, tmp_path: Path) -> None:
    result = Quantizer().bits(4).apply(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    first = result.save(tmp_path / f"first{suffix}")
    loaded = load_model(first, nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    for key, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key])
