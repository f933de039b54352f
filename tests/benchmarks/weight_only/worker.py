"""The process of one row: quantizes one network in one way, and writes what came of it.

What packages print goes to the standard error; the last line of the standard output is JSON.
"""

import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch

from mono_quant.serializers import write_state_dict
from tests.benchmarks.measure import memory, reset_peak
from tests.benchmarks.weight_only import networks
from tests.benchmarks.weight_only.package import Grid

_REASON = 200  # characters


def main(module: str, title: str, grid: str, network: str, inputs: str, output: str) -> None:
    """Quantize, and say the bits, the processor seconds and the peak of memory."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # of what packages call themselves
    torch.set_num_threads(1)
    try:
        offer = importlib.import_module(module).PACKAGE.offers[title]
        task = networks.task(network, Path(inputs))
        quantize = offer.way(task, Grid(*json.loads(grid)))
        reset_peak()
        resident, begun = memory("VmRSS"), time.process_time()
        read = quantize()
        seconds, peak = time.process_time() - begun, memory("VmHWM") - resident
        quantized = read()
        write_state_dict(Path(output), quantized.state)
        answer = {"bits": quantized.bits_per_weight, "seconds": seconds, "peak": peak}
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
        answer = {"skipped": reason[:_REASON]}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
