from os import PathLike
from typing import BinaryIO

from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpec, SubplotSpec

class Figure:
    def __init__(self, *, figsize: tuple[float, float] = ..., layout: str = ...) -> None: ...
    @property
    def axes(self) -> list[Axes]: ...
    def add_gridspec(self, nrows: int, ncols: int) -> GridSpec: ...
    def add_subplot(self, place: SubplotSpec) -> Axes: ...
    def savefig(
        self,
        fname: str | PathLike[str] | BinaryIO,
        *,
        format: str | None = ...,
        dpi: float = ...,
    ) -> None: ...
