"""A pickle's operations, followed without doing any: what it names, calls, and claims of memory."""

import pickletools
from collections.abc import Iterator
from typing import IO, cast

import attrs

_REBUILD_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"  # which calls its first argument
_NEVER = ("torch.Tensor",)
"""Beside kinds of memory, what is only ever named: called, it makes memory of any size."""

_WIDTHS = {
    "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8,
    "DoubleStorage": 8,
    "LongStorage": 8,
    "FloatStorage": 4,
    "IntStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "ShortStorage": 2,
}
"""Bytes of a value in each kind of memory; in all others one."""


def operations(stream: IO[bytes], size: int) -> Iterator[tuple[str, object]]:
    """Yield the operations of one pickle of a file of `size` bytes, and what they are given.

    Raises:
        ValueError: it is no whole pickle.
    """
    bounded = cast("IO[bytes]", _Bounded(stream, size))  # as far as it is asked
    for operation, argument, _ in pickletools.genops(bounded):
        yield operation.name, argument


class _Bounded:
    """A stream that is never asked for more than a file has, since it would make room first."""

    def __init__(self, stream: IO[bytes], most: int) -> None:
        self.tell, self.readline = stream.tell, stream.readline
        self._stream, self._most = stream, most

    def read(self, size: int) -> bytes:
        """Return so many bytes, or what is left."""
        return self._stream.read(min(size, self._most))


@attrs.frozen
class Memory:
    """What a pickle says that a tensor lies in.

    Attributes:
        count: how many values it has.
    """

    count: int


class Machine:
    """What lies on a pickle's stack, as far as it tells what is called and what memory is claimed.

    Names are `str`, texts `bytes`, numbers `int`, memory `Memory`, tuples of these `tuple`, all
    else None. It knows the operations that torch's reader does; at any other one that reader stops.
    """

    def __init__(self) -> None:
        self.claims: dict[bytes, int] = {}
        """How many bytes each memory is said to have, by its key."""
        self._stack: list[object] = []
        self._below: list[list[object]] = []
        self._memo: dict[object, object] = {}

    def step(self, operation: str, argument: object) -> tuple[object, object] | None:
        """Do an operation; return what it calls, and with what, if it calls something."""
        stack = self._stack
        match operation:
            case "GLOBAL":
                stack.append(dotted(argument))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(None)
                return function, arguments
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "TUPLE":
                self._stack = self._below.pop()
                self._stack.append(tuple(stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(operation[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "EMPTY_TUPLE":
                stack.append(())
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo.get(argument))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BUILD" | "APPEND":
                stack.pop()
            case "SETITEM":
                del stack[-2:]
            case "APPENDS" | "SETITEMS":
                self._stack = self._below.pop()
            case "BINPERSID":
                stack.append(self._claimed(stack.pop()))
            case "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(str(argument).encode("utf-8", "surrogatepass"))
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "PROTO" | "STOP":
                pass
            case _:
                stack.append(None)
        return None

    def _claimed(self, said: object) -> Memory | None:
        """Return the memory that torch would make: "storage", its type, key, device and length."""
        match said:
            case (b"storage", str(kind), bytes(key), _, int(count), *_):
                size = count * _WIDTHS.get(kind.rpartition(".")[2], 1)
                self.claims[key] = max(size, self.claims.get(key, 0))
                return Memory(count)
            case (b"storage", *_):
                raise ValueError("it names memory of no length")
        return None


def refuse_call(function: object, arguments: object) -> str | None:
    """Return why a call would take memory that is not in the file; None if it would not."""
    if not isinstance(function, str) or function in _NEVER or function.endswith("Storage"):
        return f"calls {function or 'what it made'}, which makes memory of any size"
    if function == _REBUILD_FROM_TYPE:
        match arguments:
            case (str(inner), _, tuple(own), *_) if inner.startswith("torch._utils._rebuild"):
                return refuse_call(inner, own)
        return f"calls what {function} is handed"
    if function.startswith("torch._utils._rebuild_tensor") and not _fits(arguments):
        return "holds a tensor that reaches beyond its memory"
    return None


def _fits(arguments: object) -> bool:
    """Return whether a tensor lies within its memory: that, an offset, its shape and strides."""
    match arguments:
        case (Memory(count=count), int(offset), tuple(shape), tuple(strides), *_):
            numbers = [one for one in (offset, *shape, *strides) if isinstance(one, int)]
            if len(numbers) < 1 + 2 * len(shape) or len(shape) != len(strides) or min(numbers) < 0:
                return False
            last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
            return 0 in shape or offset + last < count
    return False


def dotted(argument: object) -> str:
    """Return the name that an operation is given."""
    return str(argument).replace(" ", ".")
