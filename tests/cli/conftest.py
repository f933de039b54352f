"""A folder with files such as a user has, and a way to run the command line in it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import attrs
import pytest
import torch
from safetensors import TensorSpec, serialize_file
from torch import Tensor

from mono_quant.cli import main
from mono_quant.configurable import Config
from tests.cli.networks import Tied, small

SMALL = "tests.cli.networks:small"
TIED = "tests.cli.networks:Tied"


@attrs.frozen
class Run:
    """What the command line said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Config:
        """Its standard output, which must be one JSON object and nothing else."""
        found: object = json.loads(self.out)
        assert isinstance(found, dict)
        return cast("Config", found)

    @property
    def complaint(self) -> str:
        """Its one line on standard error."""
        (line,) = self.err.splitlines()
        assert self.out == ""
        return line


Monoquant = Callable[..., Run]


@pytest.fixture
def monoquant(capsys: pytest.CaptureFixture[str]) -> Monoquant:
    def run(*words: object) -> Run:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return Run(code, said.out, said.err)

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder: float models, whole and as state dicts, and data."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    model = small()
    torch.save(model.state_dict(), "model.pt")
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, "training.pt")
    torch.save(model, "whole.pt")
    torch.save({"model": model, "epoch": 3}, "inside.pt")
    write(model.state_dict(), "model.safetensors")
    tied = Tied().state_dict()
    del tied["head.weight"]
    write(tied, "tied.safetensors")
    batches = [torch.randn(16, 64) for _ in range(4)]
    torch.save(batches, "batches.pt")
    write({"x": batches[0]}, "batch.safetensors")
    torch.save({"x": batches[0]}, "named.pt")
    write(
        {"ids": torch.arange(24).reshape(3, 8), "mask": torch.ones(3, 8)}, "tied-batch.safetensors"
    )
    torch.save({"epoch": 3}, "no-tensor.pt")
    return tmp_path


def write(tensors: dict[str, Tensor], name: str) -> None:
    """Write tensors with the library's own writer."""
    specs = {
        key: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.numel() * tensor.element_size(),
        )
        for key, tensor in tensors.items()
    }
    serialize_file(specs, name)
