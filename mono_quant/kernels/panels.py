"""4-bit codes in the order in which torch's own product reads them, a panel of rows at a time.

The bytes are as many as before, and the nibbles the same. A panel is ``2 * half`` rows of the
weight; its byte ``[k, j]`` holds the code of row ``j`` and column ``k`` in the low nibble, and that
of row ``j + half`` in the high one. `half` is 32 or 16, by the instructions of the processor, so
this order never leaves the process.
"""

from typing import final

import attrs
import torch
from torch import Tensor

from mono_quant.base import Arranged

_CENTRE = 8  # the code that means zero where there are no zero points
_LARGEST, _TOP = 15, 127  # codes of 4 and of 8 bits
_CHUNK = 1 << 20  # bytes that are turned round at once


@final
@attrs.frozen(eq=False)
class Panels(Arranged):
    """A weight in panels.

    Attributes:
        codes: ``uint8 [panels, in, half]``.
        pairs: scale and offset of each group for torch's product: ``bfloat16 [groups, out, 2]``,
            value ``(code - 8) * scale + offset``.
        scale: ``[out or 1, runs]``, as the weight stores it; shared, not copied.
        zeros: what of the codes means zero, ``[out or 1, runs]``: ``uint8`` codes of this object's
            own, or floats, shared as `scale` is; None where all are 8.
    """

    codes: Tensor
    pairs: Tensor
    scale: Tensor
    zeros: Tensor | None

    @property
    def group(self) -> int:
        """How many columns share a scale and an offset in `pairs`."""
        return self.codes.shape[1] // self.pairs.shape[0]

    @property
    def beside(self) -> int:
        """Bytes of what the canonical weight does not have."""
        own = self.zeros is not None and not self.zeros.is_floating_point()
        return self.pairs.nbytes + (self.zeros.nbytes if own and self.zeros is not None else 0)

    def canonical(self) -> Tensor:
        """Return the codes as `PackedTensor` has them, ``uint8 [1, out, in / 2]``."""
        return to_rows(self.codes)

    def centres(self) -> Tensor:
        """Return what of the codes means zero, ``float32``, ``[out or 1, runs]`` or one for all."""
        if self.zeros is None:
            return self.scale.new_full((1, 1), _CENTRE, dtype=torch.float32)
        return self.zeros.to(torch.float32)

    def byte_step(self) -> Tensor:
        """Return the step of an 8-bit grid that covers what groups can hold, ``[out or 1]``."""
        scale = self.scale.to(torch.float32)
        below = scale * self.centres()
        reach = torch.maximum(below, scale * _LARGEST - below).amax(1)
        return (reach / _TOP).masked_fill(reach == 0, 1.0)

    def decoded(self) -> Tensor:
        """Return the weight turned, ``float32 [in, out]``; traces make one pass of it."""
        count, length, half = self.codes.shape
        scale, stored = self.scale.to(torch.float32), self.codes.transpose(0, 1)
        runs = scale.shape[1]
        nibbles = torch.stack([stored & 15, stored >> 4], 2)  # [in, panels, 2, half]
        values = nibbles.reshape(runs, length // runs, 2 * half * count).to(torch.float32)
        return ((values - self.centres().t()[:, None]) * scale.t()[:, None]).view(length, -1)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return self.codes.nbytes


def to_panels(codes: Tensor, half: int) -> Tensor:
    """Return canonical codes ``uint8 [1, out, in / 2]`` as panels ``[panels, in, half]``.

    Args:
        codes: of a number of rows that ``2 * half`` divides.
        half: rows of half a panel.
    """
    _, count, length = codes.shape
    panels = codes.new_empty(count // (2 * half), length, 2, half)
    stored = codes.reshape(len(panels), 2, half, length)
    step = _step(stored)
    for start in range(0, len(panels), step):
        part = stored[start : start + step].permute(0, 3, 1, 2).contiguous()
        low, high = part.unbind(2)  # [panels, in / 2, half], each byte two columns
        target = panels[start : start + step]
        torch.bitwise_or(low & 15, high << 4, out=target[:, :, 0])
        torch.bitwise_or(low >> 4, high & 240, out=target[:, :, 1])
    return panels.reshape(len(panels), 2 * length, half)


def to_rows(panels: Tensor) -> Tensor:
    """Return the canonical codes of `to_panels`."""
    count, length, half = panels.shape
    columns = panels.reshape(count, length // 2, 2, half)
    if torch.compiler.is_compiling():
        return _rows(columns).reshape(1, 2 * half * count, length // 2)
    rows = panels.new_empty(count, 2, half, length // 2)
    step = _step(columns)
    for start in range(0, count, step):
        rows[start : start + step].copy_(_rows(columns[start : start + step]))
    return rows.reshape(1, 2 * half * count, length // 2)


def _rows(columns: Tensor) -> Tensor:
    even, odd = columns.unbind(2)  # [panels, in / 2, half], each byte two rows
    low, high = (even & 15) | (odd << 4), (even >> 4) | (odd & 240)
    return torch.stack([low, high], 1).transpose(2, 3)  # [panels, 2, half, in / 2]


def _step(panels: Tensor) -> int:
    return max(1, _CHUNK // max(1, panels[0].numel()))
