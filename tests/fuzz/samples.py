"""The valid files that mutants are made of."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import attrs
import torch
from torch import nn

from mono_quant import FittedCodebook, OutlierColumns, PerGroup, Quantizer
from mono_quant.serializers import write_state_dict
from tests.helpers import TiedModel
from tests.serializers.files import small


@attrs.frozen
class Sample:
    """A valid file.

    Attributes:
        name: what it holds, and its format.
        suffix: of its path.
        content: its bytes.
        make: makes the float model of its architecture; None for a plain checkpoint.
    """

    name: str
    suffix: str
    content: bytes
    make: Callable[[], nn.Module] | None = None

    @property
    def ours(self) -> bool:
        """Whether it is quantized, so that every change of it is noticed."""
        return self.make is not None


DATA = torch.linspace(-1, 1, 8 * 64).reshape(8, 64)
QUANTIZED: dict[str, tuple[Quantizer, Callable[[], nn.Module]]] = {
    "4-bit": (Quantizer().bits(4), small),
    "static": (Quantizer().fit(DATA), small),
    "outliers": (Quantizer().outliers(OutlierColumns(2)), small),
    "tables": (Quantizer().scheme(FittedCodebook(4, PerGroup(8), torch.float8_e4m3fn)), small),
    "tied": (Quantizer().bits(3), TiedModel),
}


@functools.cache
def samples() -> tuple[Sample, ...]:
    """Return all of them; the same bytes each time."""
    found: list[Sample] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, (quantizer, make) in QUANTIZED.items():
            for suffix in (".safetensors", ".pt"):
                torch.manual_seed(0)
                path = quantizer.only("*").apply(make()).save(folder / f"model{suffix}")
                found.append(Sample(f"{kind} {suffix}", suffix, path.read_bytes(), make))
        torch.manual_seed(0)
        state = small().state_dict()
        path = folder / "plain.safetensors"
        write_state_dict(path, state)
        found.append(Sample("plain .safetensors", path.suffix, path.read_bytes()))
        for kind, new in (("plain", True), ("old plain", False)):
            path = folder / "plain.pt"
            torch.save(state, path, _use_new_zipfile_serialization=new)
            found.append(Sample(f"{kind} .pt", path.suffix, path.read_bytes()))
    return tuple(found)
