"""What each command was told, with its types: argparse itself knows none."""

from argparse import Namespace
from pathlib import Path


class ModelOptions(Namespace):
    """How a command comes by a model and by data.

    Attributes:
        factory: ``package.module:callable`` that makes the float model.
        forward: ``package.module:callable`` that calls the model with a batch.
        imports: modules to import first, for the kinds that they register.
    """

    factory: str | None
    forward: str | None
    imports: list[str]


class PlanOptions(ModelOptions):
    """What ``plan`` was told, and ``quantize`` too; see their help."""

    positional: Path | None
    model: Path | None
    trust_pickle: bool
    bits: int | None
    quality: str | None
    scheme: str | None
    symmetric: bool | None
    granularity: str | None
    group_size: int | None
    scale_dtype: str | None
    float_zero_point: bool | None
    outliers: str | None
    observer: str | None
    rounding: str | None
    only: list[str]
    skip: list[str]
    override: list[str]
    activations: str | None
    activation_bits: int | None
    activation_symmetric: bool | None
    activation_granularity: str | None
    activation_dtype: str | None
    activation_observer: str | None
    fold: bool | None
    transform: list[str]
    on_damage: str | None
    graph: bool
    only_if_faster: bool
    example: Path | None
    margin: float | None
    calibration: Path | None
    samples: int | None
    measure_on: Path | None
    statistics: Path | None
    layer: list[str]
    config: Path | None
    quiet: bool


class CalibrateOptions(PlanOptions):
    """What ``calibrate`` was told; see its help."""

    output: Path


class QuantizeOptions(PlanOptions):
    """What ``quantize`` was told beside that; see its help."""

    output: Path | None
    in_place: bool
    sequential: bool | None
    resume: Path | None
    html: Path | None
    validate: bool
    require_coverage: float | None
    require_sqnr: float | None
    dump_config: bool


class InfoOptions(ModelOptions):
    """What ``info`` was told; see its help."""

    file: Path
    html: Path | None


class ValidateOptions(ModelOptions):
    """What ``validate`` was told; see its help."""

    file: Path
    example: Path | None


class BenchmarkOptions(ModelOptions):
    """What ``benchmark`` was told; see its help."""

    file: Path
    example: Path | None
    graph: bool
    seconds: float


class CompareOptions(ModelOptions):
    """What ``compare`` was told; see its help."""

    reference: Path
    other: Path
    calibration: Path | None
    samples: int | None


class DequantizeOptions(ModelOptions):
    """What ``dequantize`` was told; see its help."""

    file: Path
    output: Path
    quiet: bool


class CheckOptions(ModelOptions):
    """What ``check`` was told; see its help."""

    target: str


class DemoOptions(Namespace):
    """What ``demo`` was told; see its help."""

    output: Path | None
    quiet: bool
