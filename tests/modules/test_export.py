"""Exported programs are plain torch: they load and run where this package is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mono_quant import InputError, Quantizer
from tests.helpers import TiedModel, same_bits
from tests.modules.layers import LAYERS, TAUGHT

ALONE = """
import sys
from pathlib import Path

sys.modules["mono_quant"] = None  # an import of it raises
import torch

for path in sorted(Path(sys.argv[1]).glob("*.pt2")):
    program = torch.export.load(path)
    args, kwargs, expected = torch.load(path.with_suffix(".pt"))
    found = program.module()(*args, **kwargs)
    assert torch.equal(found, expected), path
    print(path.stem)
assert not any(name.startswith("mono_quant.") for name in sys.modules)
"""


class Two(nn.Module):
    """Takes two inputs, one of them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(64, 8), nn.Linear(64, 8)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        found: Tensor = self.left(x)
        return found if y is None else found + self.right(y)


@pytest.mark.slow
def test_a_saved_program_runs_where_the_package_cannot_be_imported(tmp_path: Path) -> None:
    for name, make in LAYERS.items():
        source, x = make()
        result = TAUGHT.bits(4).apply(source.eval())
        torch.export.save(result.export(x), tmp_path / f"{name}.pt2")
        torch.save(((x,), {}, result.model(x).detach()), tmp_path / f"{name}.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == sorted(LAYERS, key=lambda name: f"{name}.pt2")


@pytest.mark.parametrize("bits", [4, 8])
def test_an_exported_model_computes_the_same_bits(bits: int) -> None:
    source = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    result = Quantizer().bits(bits).apply(source)
    x = torch.randn(3, 64)
    program = result.export(x)
    assert same_bits(program.module()(x), result.model(x))
    assert result.model.training, "export left the model in eval mode"


def test_the_example_may_be_a_tuple_or_a_mapping_or_the_data() -> None:
    source = Two().eval()
    x, y = torch.randn(3, 64), torch.randn(3, 64)
    result = Quantizer().fit([(x, y)]).apply(source)
    expected = result.model(x, y)
    assert same_bits(result.export((x, y)).module()(x, y), expected)
    assert same_bits(result.export({"x": x, "y": y}).module()(x=x, y=y), expected)
    assert same_bits(result.export().module()(x, y), expected)


def test_labels_of_an_example_are_left_out() -> None:
    result = Quantizer().apply(nn.Sequential(nn.Linear(64, 8)).eval())
    x = torch.randn(3, 64)
    program = result.export((x, torch.tensor([0, 1, 2])))
    assert same_bits(program.module()(x), result.model(x))


def test_export_needs_an_example() -> None:
    with pytest.raises(InputError, match=r"export\(example\)"):
        Quantizer().apply(nn.Linear(64, 8)).export()


def test_tied_weights_are_exported_once() -> None:
    result = Quantizer().only("*").apply(TiedModel().eval())
    program = result.export(torch.arange(64))
    codes = [tensor for name, tensor in program.state_dict.items() if name.endswith("codes")]
    assert len({tensor.data_ptr() for tensor in codes}) == 2
    assert same_bits(program.module()(torch.arange(64)), result.model(torch.arange(64)))


def test_a_model_that_is_run_by_a_function_needs_an_example_of_its_arguments() -> None:
    source, x = nn.Sequential(nn.Linear(64, 8)).eval(), torch.randn(3, 64)
    quantizer = Quantizer().fit({"rows": x}, forward=lambda model, batch: model(x))
    result = quantizer.apply(source)
    with pytest.raises(InputError, match=r"fit\(forward=\.\.\.\).*export\(example\)"):
        result.export()
    assert same_bits(result.export(x).module()(x), result.model(x))
