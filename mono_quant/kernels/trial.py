"""Whether the integer product can be trusted on this machine, asked once."""

from functools import cache

from mono_quant.kernels.ops import int_mm_refusal
from mono_quant.kernels.store import STORE

_NAME = "integer product"
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
