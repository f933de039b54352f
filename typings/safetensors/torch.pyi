"""What the benchmarks compare with."""

from os import PathLike
from typing import Literal

from torch import Tensor

def load_file(
    filename: str | PathLike[str],
    device: str = "cpu",
    *,
    backend: Literal["mmap", "pread"] = "mmap",
) -> dict[str, Tensor]: ...
