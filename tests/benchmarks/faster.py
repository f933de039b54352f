"""What only_if_faster measures of a layer by itself, beside what it takes within a whole model."""

from collections.abc import Iterator

import torch
from torch import nn

from mono_quant import Quantizer
from mono_quant.benchmark import measure_speed
from mono_quant.calibration import CalibrationData
from tests.benchmarks.measure import one_thread, print_table

SETTINGS = {"INT8, dynamic inputs": Quantizer(), "INT4 g64, float inputs": Quantizer().bits(4)}
CASES = ((512, 12, 1), (512, 12, 64), (1024, 24, 1), (1024, 24, 64), (2048, 12, 1), (2048, 12, 64))
"""Width of square layers, how many a model has, and the rows that they meet."""

SECONDS = 2.0


def main() -> None:
    """Print both ratios over float, and which way only_if_faster decides."""
    print("Models of equal Linear layers, ratio over the float32 one by wall time, one thread. 'in")
    print("the model': whole models by turns. 'by itself': one layer, as only_if_faster sees it.\n")
    columns = ("setting", "layers", "rows", "in the model", "by itself", "decided")
    with one_thread():
        print_table(columns, _rows())


def _rows() -> Iterator[tuple[str, ...]]:
    for name, quantizer in SETTINGS.items():
        for width, count, rows in CASES:
            torch.manual_seed(0)
            model = nn.Sequential(*(nn.Linear(width, width) for _ in range(count))).eval()
            x = torch.randn(rows, width)
            example = CalibrationData.example(x)
            quantized = quantizer.apply(model, progress=False).model
            whole = measure_speed(model, quantized, example, SECONDS)
            weight = quantizer.only_if_faster(x).plan(model).measured(progress=False).weights[0]
            alone = f"{weight.speed.ratio:.2f}" if weight.speed is not None else ""
            decided = "float" if weight.recipe is None else "quantized"
            size = f"{count} of {width} x {width}"
            yield name, size, str(rows), f"{whole.ratio:.2f}", alone, decided


if __name__ == "__main__":
    main()
