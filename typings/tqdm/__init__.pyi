"""The part of tqdm that this project uses."""

from collections.abc import Iterable, Iterator
from threading import RLock
from types import TracebackType
from typing import Generic, Self, TextIO

from typing_extensions import TypeVar

T = TypeVar("T", default=object)

class tqdm(Generic[T]):
    total: float | None
    monitor_interval: int
    def __init__(
        self,
        iterable: Iterable[T] | None = None,
        desc: str | None = None,
        total: float | None = None,
        leave: bool | None = True,
        file: TextIO | None = None,
        *,
        disable: bool | None = False,
        unit: str = "it",
        delay: float = 0,
    ) -> None: ...
    def __iter__(self) -> Iterator[T]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
    def update(self, n: float | None = 1) -> bool | None: ...
    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None: ...
    def close(self) -> None: ...
    @classmethod
    def set_lock(cls, lock: RLock) -> None: ...
    @classmethod
    def get_lock(cls) -> RLock: ...
