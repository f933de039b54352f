"""The part of safetensors that is used; its own stubs leave arguments and results untyped."""

from collections.abc import Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Literal, Self

from torch import Tensor

class SafetensorError(Exception): ...

class TensorSpec:
    def __init__(
        self, *, dtype: str, shape: Sequence[int], data_ptr: int, data_len: int
    ) -> None: ...

def serialize_file(
    tensor_dict: Mapping[str, TensorSpec],
    filename: str | PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None: ...

class safe_open:  # its name there
    def __init__(
        self, filename: str | PathLike[str], framework: Literal["pt"], device: str = "cpu"
    ) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
    def keys(self) -> list[str]: ...
    def metadata(self) -> dict[str, str] | None: ...
    def get_tensor(self, name: str) -> Tensor: ...
