"""optimum-quanto: weights alone."""

import importlib
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from tests.benchmarks.contenders.contender import Made, Package, Task, saved_bytes


def _weights(dtype: str) -> Callable[[Task], Made]:
    def make(task: Task) -> Made:
        quanto: Any = importlib.import_module("optimum.quanto")
        model = deepcopy(task.model)
        quanto.quantize(model, weights=getattr(quanto, dtype))
        quanto.freeze(model)
        return Made(model, saved_bytes(model))

    return make


PACKAGE = Package(
    "optimum-quanto",
    ("optimum-quanto==0.2.7",),
    decoders={
        "INT8, weights alone": _weights("qint8"),
        "INT4 g128, weights alone": _weights("qint4"),
    },
)
