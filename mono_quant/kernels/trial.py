"""Which products can be trusted on this machine, asked once."""

from functools import cache

from mono_quant.kernels.ops import int4_half, int_mm_refusal
from mono_quant.kernels.store import STORE

_NAME = "integer product"
_INT4 = "4-bit product"
_WORKS = "works"


@cache
def int_mm_works() -> str | None:
    """Return why `mono_quant.kernels.ops.int_mm` cannot be used here, or None.

    Found by trial and remembered for this machine; the first time takes seconds.
    """
    found = STORE.get(_NAME)
    if found is None:
        found = int_mm_refusal() or _WORKS
        STORE.set(_NAME, found)
    return None if found == _WORKS else found


@cache
def int4_panel() -> int | str:
    """Return half the rows of a panel of `mono_quant.kernels.ops.int4_mm`, or why it is not used.

    Found by trial and remembered for this machine; the first time takes seconds.
    """
    found = STORE.get(_INT4)
    if found is None:
        found = str(int4_half())
        STORE.set(_INT4, found)
    return int(found) if found.isdecimal() else found
