"""What the package hands out, and what importing it costs."""

import subprocess
import sys
import types
from functools import cache
from importlib import metadata, resources

import pytest

import mono_quant

ALLOWED = {"torch", "safetensors", "attr", "attrs", "tqdm", "mono_quant"}


def run(program: str, allowed: str = "default::ImportWarning") -> str:
    """Return what a program prints in a fresh interpreter; it must not fail or warn.

    Args:
        program: its text.
        allowed: the filter of the only warnings that it may raise.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", allowed, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def kind_then_name(name: str) -> tuple[int, str]:
    """Return what ruff sorts ``__all__`` by: constants, then classes, then the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_all_is_sorted_and_without_doubles() -> None:
    assert list(mono_quant.__all__) == sorted(set(mono_quant.__all__), key=kind_then_name)


def test_all_is_exactly_what_the_package_holds() -> None:
    public = {
        name
        for name, value in vars(mono_quant).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert set(mono_quant.__all__) == public | {"__version__"}


@pytest.mark.parametrize("name", mono_quant.__all__)
def test_every_public_name_exists_and_says_what_it_is(name: str) -> None:
    value: object = getattr(mono_quant, name)
    if name != "__version__":
        assert value.__doc__
        assert value.__doc__.strip()


def test_what_is_public_is_defined_in_this_package() -> None:
    for name in mono_quant.__all__:
        value: object = getattr(mono_quant, name)
        if isinstance(value, type | types.FunctionType):
            assert value.__module__.startswith("mono_quant."), name
            assert value.__qualname__ == name


def test_a_star_import_brings_what_is_public() -> None:
    program = "from mono_quant import *; print(sorted(n for n in dir() if n[0] != '_'))"
    expected = sorted(name for name in mono_quant.__all__ if name[0] != "_")
    assert run(program).strip() == str(expected)


def test_the_version_is_that_of_the_distribution() -> None:
    assert mono_quant.__version__ == metadata.version("mono-quant")


@cache
def imported() -> frozenset[str]:
    """Return the modules that importing the package loads, beyond those of torch."""
    program = """
import sys
import torch
before = set(sys.modules)
import mono_quant
print(*set(sys.modules) - before)
"""
    return frozenset(run(program).split())


def test_importing_loads_nothing_but_torch_and_three_small_libraries() -> None:
    roots = {name.partition(".")[0] for name in imported()}
    assert roots - sys.stdlib_module_names <= ALLOWED


@pytest.mark.parametrize(
    "name",
    [
        "numpy",
        "argparse",
        "mono_quant.cli",
        "mono_quant.demo",
        "mono_quant.testing",
        "mono_quant.pictures",
        "safetensors.torch",
        "torch._dynamo",
    ],
)
def test_importing_does_not_load_what_only_some_need(name: str) -> None:
    assert name not in imported()


WITHOUT_NUMPY = """
import sys
sys.modules["numpy"] = None  # any import of it fails from here on
import tempfile
from pathlib import Path
import torch
from torch import nn
import mono_quant

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()

data = [torch.randn(4, 64) for _ in range(3)]
result = mono_quant.Quantizer().bits(4).observer(mono_quant.MSE(steps=4)).fit(data).apply(model())
assert result.validate(data[0]).status == "valid"
with tempfile.TemporaryDirectory() as folder:
    for suffix in (".safetensors", ".pt"):
        path = result.save(Path(folder) / f"model{suffix}")
        loaded = mono_quant.load_model(path, model())
        assert torch.equal(loaded(data[0]), result.model(data[0]))
result.dequantize()
print(result.report.to_json()[0], str(result.report)[0] != "", sys.modules["numpy"])
"""


def test_everything_works_without_numpy() -> None:
    torchs_own = "ignore:Failed to initialize NumPy:UserWarning"
    assert run(WITHOUT_NUMPY, torchs_own).split() == ["{", "True", "None"]


def test_the_package_is_typed() -> None:
    assert resources.files(mono_quant).joinpath("py.typed").is_file()


@pytest.mark.parametrize("collecting", [True, False])
def test_importing_collects_no_garbage_and_leaves_the_collector_as_it_was(collecting: bool) -> None:
    program = f"""
import gc, torch
{"gc.enable()" if collecting else "gc.disable()"}
full = gc.get_stats()[2]["collections"]
import mono_quant
print(gc.isenabled(), gc.get_stats()[2]["collections"] - full)
"""
    assert run(program).split() == [str(collecting), "0"]
