"""How many values share one scale, as the block of values that does."""

from abc import ABC, abstractmethod
from typing import ClassVar

import attrs

from mono_quant.configurable import Configurable, is_count, register
from mono_quant.errors import ConfigurationError, InputError

Shape = tuple[int, ...]


class Granularity(Configurable, ABC):
    """Which values share one scale: answered as the shape of the block that does.

    ===================  ====================  =========================
    granularity          block of [G, out, in]  scales
    ===================  ====================  =========================
    ``PerTensor()``      ``(G, out, in)``      ``[1, 1, 1]``
    ``PerChannel()``     ``(1, 1, in)``        ``[G, out, 1]``
    ``PerGroup(64)``     ``(1, 1, 64)``        ``[G, out, in / 64]``
    ===================  ====================  =========================

    Activations come as rows ``[..., features]`` (see `Operation.rows`): ``PerToken()`` has a scale
    for each row, ``PerTensor()`` one for all.
    """

    __slots__ = ()

    @abstractmethod
    def block_size(self, shape: Shape) -> Shape:
        """Return the block of a tensor of `shape` that shares one scale, a size per dimension.

        Raises:
            InputError: the blocks do not tile the shape (ask `refuse` first).
        """

    def refuse(self, shape: Shape) -> str | None:
        """Return why a tensor of `shape` cannot be cut into these blocks, or None."""
        return None

    def describe(self) -> str:
        """Return the granularity in a word, for reports."""
        return self.kind.replace("_", "-")


@register
@attrs.frozen
class PerTensor(Granularity):
    """One scale for the whole tensor."""

    kind: ClassVar[str] = "per_tensor"

    def block_size(self, shape: Shape) -> Shape:
        """Return `shape` itself."""
        return shape


@register
@attrs.frozen
class PerChannel(Granularity):
    """One scale for each row of the weight matrix: each output channel."""

    kind: ClassVar[str] = "per_channel"

    def block_size(self, shape: Shape) -> Shape:
        """Return one whole row."""
        return (*(1 for _ in shape[:-1]), *shape[-1:])


@register
@attrs.frozen
class PerToken(Granularity):
    """One scale for each row of activations: a token, or a sample of a convolution's input."""

    kind: ClassVar[str] = "per_token"

    def block_size(self, shape: Shape) -> Shape:
        """Return one whole row."""
        return (*(1 for _ in shape[:-1]), *shape[-1:])


def _check_size(_: object, __: object, size: object) -> None:
    if not is_count(size, 1):
        raise ConfigurationError(f"a group has 1 value or more, not {size!r}")


@register
@attrs.frozen
class PerGroup(Granularity):
    """One scale for each run of `size` neighbours in a row.

    Attributes:
        size: values in a group; must divide the length of a row.
    """

    kind: ClassVar[str] = "per_group"
    size: int = attrs.field(default=64, validator=_check_size)

    def block_size(self, shape: Shape) -> Shape:
        """Return `size` neighbours of one row."""
        if reason := self.refuse(shape):
            raise InputError(reason)
        return (*(1 for _ in shape[:-1]), self.size)

    def refuse(self, shape: Shape) -> str | None:
        """Return why groups of this size do not tile a row of `shape`, or None."""
        if shape[-1] % self.size:
            return f"a group of {self.size} does not divide a row of {shape[-1]}"
        return None

    def describe(self) -> str:
        """Return the kind and the size."""
        return f"per-group {self.size}"
