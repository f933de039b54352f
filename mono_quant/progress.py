"""Progress bars that leave nothing behind."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Bar(tqdm):
    """A progress bar without tqdm's watching thread.

    That thread stays in the process, even of a bar that is not shown, and a fork at a moment at
    which it holds a lock leaves a child that waits for ever.
    """

    monitor_interval = 0


def shown(items: Sequence[T], label: str, unit: str, *, quiet: bool) -> Iterator[T]:
    """Yield items, and how far they are on the terminal unless that is to be quiet."""
    disable = True if quiet else None
    with Bar(total=len(items), desc=label, unit=unit, disable=disable, leave=False) as bar:
        for item in items:
            yield item
            bar.update()
