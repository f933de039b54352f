"""The same quantizer, model and data give the same bytes, and nearly so whatever else changes.

Processes that write the same file are in `tests/serializers/test_determinism.py`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    AWQ,
    GPTQ,
    HQQ,
    MSE,
    LearnedRounding,
    QuantizationResult,
    QuantizedModule,
    Quantizer,
    quantize,
)
from mono_quant.files import describe_file
from tests.helpers import noise, same_tensors
from tests.serializers.files import read

ROWS = noise(48, 128)
SPLITS = {
    "at once": [48],
    "in eights": [8] * 6,
    "one by one": [1] * 48,
    "unevenly": [1, 30, 3, 14],
}


@attrs.frozen
class Tolerance:
    """How far two runs may lie apart.

    Attributes:
        codes: share of a weight's codes that may be others.
        scales: of scales, as a share of each.
        decibels: of the SQNR of the output.
    """

    codes: float
    scales: float
    decibels: float


EXACT = Tolerance(0, 1e-6, 1e-4)
"""Ranges look at the weight alone, or at extremes of inputs that differ in their last bits."""

ROUNDED_BY_DATA = Tolerance(0.3, 0, 0.3)
"""A value near the middle of two grid points falls by the last bit of a sum, and moves the others.

Which of them is right is a draw: the outputs are as good.
"""

QUANTIZERS: dict[str, tuple[Quantizer, Tolerance]] = {
    "4-bit": (Quantizer().bits(4), EXACT),
    "MSE": (Quantizer().bits(4).observer(MSE()), EXACT),
    "HQQ": (Quantizer().bits(4).float_zero_point().rounding(HQQ()), EXACT),
    "static inputs": (Quantizer(), EXACT),
    "AWQ": (Quantizer().bits(4).transform(AWQ()), EXACT),
    "GPTQ": (Quantizer().bits(4).rounding(GPTQ()), ROUNDED_BY_DATA),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 32))
    return nn.Sequential(*layers).eval()


def parts(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield codes and scales of every weight, and the scales of every input."""
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            for packed in module.packed_weights().values():
                q = packed.unpack()
                assert q.qparams.scale is not None
                yield q.codes, q.qparams.scale.double()
            for activation in module.activations().values():
                if activation.scale is not None:
                    yield torch.zeros(1), activation.scale.double()


def assert_near(
    one: QuantizationResult[nn.Sequential],
    other: QuantizationResult[nn.Sequential],
    tolerance: Tolerance,
) -> None:
    for (codes, scales), (others, expected) in zip(
        parts(one.model), parts(other.model), strict=True
    ):
        assert (codes != others).double().mean() <= tolerance.codes
        apart = (scales - expected).abs() / expected.abs().clamp(min=1e-30)
        assert apart.max() <= tolerance.scales
    found, wanted = one.report.output_sqnr_db, other.report.output_sqnr_db
    assert found is not None
    assert wanted is not None
    assert abs(found - wanted) <= tolerance.decibels


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_how_the_samples_are_split_into_batches_changes_next_to_nothing(name: str) -> None:
    quantizer, tolerance = QUANTIZERS[name]
    first, *rest = (
        quantizer.fit(list(torch.split(ROWS, sizes))).apply(network()) for sizes in SPLITS.values()
    )
    for other in rest:
        assert_near(other, first, tolerance)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", [*QUANTIZERS, "learned"])
def test_how_many_threads_there_are_changes_next_to_nothing(name: str) -> None:
    quantizer, tolerance = {
        **QUANTIZERS,
        "learned": (
            Quantizer().bits(4).rounding(LearnedRounding(steps=5)),
            attrs.evolve(ROUNDED_BY_DATA, scales=0.05),
        ),
    }[name]
    torch.set_num_threads(1)
    first = quantizer.fit(ROWS).apply(network())
    for count in (2, 3):
        torch.set_num_threads(count)
        assert_near(quantizer.fit(ROWS).apply(network()), first, tolerance)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_order_of_the_keys_of_a_batch_changes_nothing(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor, gain: Tensor) -> Tensor:
            found: Tensor = self.body(x * gain)
            return found

    quantizer, _ = QUANTIZERS[name]
    batch = {"x": ROWS, "gain": torch.full((48, 1), 0.5)}
    one, other = (
        quantizer.fit([given]).apply(Named()) for given in (batch, dict(reversed(batch.items())))
    )
    assert same_tensors(one.model, other.model)
    assert one.report.to_json() == other.report.to_json()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_order_of_the_keys_of_a_state_dict_changes_no_value(
    suffix: str, tmp_path: Path
) -> None:
    """A file and a report go through a model in its own order, and hold the same."""
    state = network().state_dict()
    found = []
    for place, given in enumerate((state, dict(reversed(state.items())))):
        texts, tensors = read(quantize(given, 4).save(tmp_path / f"{place}{suffix}"))
        header = json.loads(texts["header"])
        del header["summary"]["warnings"]  # which name the last layer
        header["summary"]["layers"].sort(key=lambda row: row["name"])
        found.append((header, {name: tensor.tolist() for name, tensor in tensors.items()}))
    assert found[0] == found[1]


PROGRAM = """
import sys
from pathlib import Path
from tests.test_determinism import AWQ, GPTQ, LearnedRounding, Quantizer, ROWS, network
for name, quantizer in {
    "static": Quantizer(),
    "gptq": Quantizer().bits(4).rounding(GPTQ()).transform(AWQ()),
    "learned": Quantizer().bits(4).rounding(LearnedRounding(steps=3)),
}.items():
    for suffix in (".safetensors", ".pt"):
        quantizer.fit(ROWS).apply(network()).save(Path(sys.argv[1], name + suffix))
"""


def test_processes_that_hash_otherwise_write_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "12345"]
    for folder in folders:
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": folder.name, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, folder], check=True, env=environment
        )
    found = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert len(found[0]) == 6
    assert found[0] == found[1]


def test_the_seed_of_what_draws_is_in_the_file(tmp_path: Path) -> None:
    quantizer = Quantizer().bits(4).rounding(LearnedRounding(steps=1, seed=77)).fit(ROWS)
    path = quantizer.apply(network()).save(tmp_path / "model.safetensors")
    config = json.loads(json.dumps(describe_file(path).config))
    assert config["settings"]["rounding"]["seed"] == 77
    again = Quantizer.from_config(config).fit(ROWS).apply(network())
    assert again.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
