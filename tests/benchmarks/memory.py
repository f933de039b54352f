"""Peak memory of quantizing, saving and loading a model of 1 GB, beside what the plan predicts.

Each row is a process of its own. The peak is VmHWM of Linux less what was resident before the model
was built; the private peak is RssAnon, sampled: without the pages of files that are mapped, which
the system takes back when it wants them.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from mono_quant import Quantizer, load_model
from tests.benchmarks.measure import MB, fresh, memory, print_table, reset_peak

WIDTH = 3072
LAYERS = 28
BITS = (8, 4)


def main() -> None:
    """Print the peaks of apply and apply_, then those of save and load_model."""
    if not Path("/proc/self/status").exists():
        print("skipped: this system has no /proc/self/status")
        return
    print(f"{LAYERS} Linears of {WIDTH} x {WIDTH} in float32; a layer is {_layer() / MB:.1f} MB.\n")
    columns = ("call", "bits", "model MB", "result MB", "peak MB", "of the model", "predicted MB")
    print_table(
        (*columns, "measured/predicted", "work (layers)", "kept afterwards MB"), _quantizing()
    )
    files = ("call", "bits", "file MB", "peak MB", "of the file", "private peak MB")
    print_table((*files, "kept afterwards MB"), _files())


def network() -> nn.Sequential:
    """Return the float model."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).eval()


def child(call: str, bits: str, path: str) -> None:
    """Print what one call takes: "apply", "apply_", "save" or "load"."""
    quantizer = Quantizer().bits(int(bits))
    _warm_up(quantizer)
    resident, private = memory("VmRSS"), memory("RssAnon")
    found: dict[str, float] = {}
    if call == "load":
        with torch.device("meta"):
            skeleton = network()
        reset_peak()
        kept: object = load_model(path, skeleton)
    else:
        model = network()
        outline = quantizer.plan(model).outline
        found = {"model": outline.report.float_bytes, "result": outline.report.bytes}
        assert outline.peak_bytes_in_place is not None, "it is no graph"
        found["apply"], found["apply_"] = outline.peak_bytes, outline.peak_bytes_in_place
        if call == "save":
            kept = quantizer.apply_(model)
            held = memory("VmRSS")
            found["held"] = held - resident
            reset_peak()
            kept.save(path)
        else:
            reset_peak()
            kept = (quantizer.apply_ if call == "apply_" else quantizer.apply)(model)
    found["peak"] = memory("VmHWM") - resident
    found["kept"] = memory("RssAnon") - private
    found["private"] = private
    print(json.dumps(found))


def _quantizing() -> Iterator[tuple[str, ...]]:
    for call in ("apply", "apply_"):
        for bits in BITS:
            found, _ = fresh("memory", call, bits, "-")
            model, peak = found["model"], found["peak"]
            beside = found["result"] if call == "apply" else 0
            yield (
                call,
                str(bits),
                f"{model / MB:.0f}",
                f"{found['result'] / MB:.0f}",
                f"{peak / MB:.0f}",
                f"{peak / model:.2f}",
                f"{found[call] / MB:.0f}",
                f"{peak / found[call]:.3f}",
                f"{(peak - model - beside) / _layer():.2f}",
                f"{found['kept'] / MB:.0f}",
            )


def _files() -> Iterator[tuple[str, ...]]:
    for bits in BITS:
        with tempfile.TemporaryDirectory(prefix="mono_quant_") as folder:
            path = Path(folder) / "model.safetensors"
            for call in ("save", "load"):
                found, private = fresh("memory", call, bits, path)
                size = path.stat().st_size
                peak = found["peak"] - found.get("held", 0)
                alone = private - found["private"]
                yield (
                    "load_model" if call == "load" else "save, beyond the model",
                    str(bits),
                    f"{size / MB:.0f}",
                    f"{peak / MB:.0f}",
                    f"{peak / size:.2f}",
                    f"{alone / MB:.0f}" if call == "load" else "",
                    f"{found['kept'] / MB:.0f}",
                )


def _layer() -> float:
    return 4 * WIDTH * WIDTH


def _warm_up(quantizer: Quantizer) -> None:
    """Load what is loaded on first use, so that it is not counted."""
    with tempfile.TemporaryDirectory(prefix="mono_quant_") as folder:
        path = Path(folder) / "small.safetensors"
        quantizer.apply(nn.Sequential(nn.Linear(64, 64))).save(path)
        load_model(path, nn.Sequential(nn.Linear(64, 64)))


if __name__ == "__main__":
    child(*sys.argv[1:])
