"""Real models of other kinds at 8 and 4 bits: metric, size, output, what stays float."""

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, cast

from torch import Tensor, nn

from mono_quant import QuantizationResult, Quantizer
from tests.benchmarks.measure import MB, print_table
from tests.models import AssetUnavailable

NAMES = ("efficientnet_lite0", "resemblyzer", "g2p", "silero_vad", "textgenrnn", "smollm2")
WIDTHS = (8, 4)


class RealModel(Protocol):
    """A module of tests.models."""

    load: Callable[[], nn.Module]
    sample_inputs: Callable[[], tuple[Tensor, ...]]
    evaluate: Callable[[nn.Module], dict[str, float]]


def real_model(name: str) -> RealModel:
    """Return a module of tests.models by its name."""
    return cast("RealModel", importlib.import_module(f"tests.models.{name}"))


def quantized(loader: RealModel, model: nn.Module, bits: int) -> QuantizationResult[nn.Module]:
    """Return a model at a width, all else by default, measured on its sample inputs."""
    return Quantizer().bits(bits).fit([loader.sample_inputs()]).apply(model)


def left_float(result: QuantizationResult[nn.Module]) -> Mapping[str, float]:
    """Return the share of the bytes after that stays float, by reason, the largest first."""
    total = result.report.bytes
    counted: Counter[str] = Counter()
    for row in result.report.kept:
        counted[row.reason or "?"] += row.bytes
    counted["buffers"] += result.report.buffer_bytes
    return {reason: size / total for reason, size in counted.most_common() if size}


def main() -> None:
    """Print what quantizing does to each model, then what it leaves alone."""
    kept: list[tuple[str, ...]] = []
    columns = (
        "model",
        "bits",
        "metric: float → quantized",
        "MB: float → quantized",
        "ratio",
        "bits/weight",
        "mean weight SQNR",
        "output SQNR",
        "saved, reloaded, run",
    )
    print_table(columns, _rows(kept))
    print_table(("model", "bits", "share of its bytes that stays float"), kept)


def _rows(kept: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    for name in NAMES:
        loader = real_model(name)
        try:
            model = loader.load()
            before = loader.evaluate(model)
        except AssetUnavailable as reason:
            yield (name, "", f"skipped: {reason}", *[""] * 6)
            continue
        for bits in WIDTHS:
            result = quantized(loader, model, bits)
            after, report = loader.evaluate(result.model), result.report
            metrics = [f"{key} {before[key]:.4g} → {after[key]:.4g}" for key in before]
            mean, output = report.mean_sqnr_db, report.output_sqnr_db
            yield (
                name,
                str(bits),
                ", ".join(metrics),
                f"{report.float_bytes / MB:.2f} → {report.bytes / MB:.2f}",
                f"{report.ratio:.2f}",
                f"{report.bits_per_weight:.3f}",
                f"{mean:.1f}" if mean is not None else "",
                f"{output:.1f}" if output is not None else "",
                result.validate().status,
            )
            shares = [f"{share:.1%} {reason}" for reason, share in left_float(result).items()]
            kept.append((name, str(bits), "; ".join(shares)))
