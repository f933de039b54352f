"""Options that several commands share, and those that say how to quantize."""

from argparse import ArgumentParser, BooleanOptionalAction, _ArgumentGroup
from pathlib import Path

from mono_quant.calibration import DEFAULT_SAMPLES
from mono_quant.schemes import OutlierColumns
from mono_quant.settings import QUALITIES
from mono_quant.speed import NO_DIFFERENCE


def add_model(model: _ArgumentGroup) -> None:
    """Which model, and what is run through it."""
    model.add_argument("positional", nargs="?", type=Path, metavar="FILE", help="as --model")
    model.add_argument(
        "--model",
        type=Path,
        metavar="FILE",
        help="a checkpoint: .safetensors, or torch's format; without --factory its weights are "
        "quantized as they are; with --factory and no file, the factory's own weights are",
    )
    model.add_argument(
        "--trust-pickle",
        action="store_true",
        help="read a pickled module, which runs whatever code the file holds",
    )
    add_factory(model)
    add_forward(model)
    add_calibration(model)


def add_factory(command: ArgumentParser | _ArgumentGroup) -> None:
    """What makes the model."""
    command.add_argument(
        "--factory",
        metavar="package.module:callable",
        help="makes the float torch.nn.Module; modules are also looked for in this folder",
    )


def add_forward(command: ArgumentParser | _ArgumentGroup) -> None:
    """What calls it."""
    command.add_argument(
        "--forward",
        metavar="package.module:callable",
        help="called with (model, batch) where model(batch) will not do",
    )


def add_calibration(command: ArgumentParser | _ArgumentGroup) -> None:
    """What is run through it."""
    command.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="data to run: a .pt of a tensor, of a dictionary (one batch of keyword arguments) or "
        "of a list of batches; a .safetensors, .npz or .npy, one batch: a tensor or keyword "
        "arguments; or a folder of such files, in the order of their names",
    )
    command.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help=f"go on until this many samples were seen (default: {DEFAULT_SAMPLES})",
    )


def add_measured(model: _ArgumentGroup) -> None:
    """What the result is measured on."""
    model.add_argument(
        "--measure-on",
        type=Path,
        metavar="FILE",
        help="data to measure the result on, in a file as --calibration reads it (default: that of "
        f"--calibration); of much, the first {DEFAULT_SAMPLES} samples",
    )


def add_statistics(model: _ArgumentGroup) -> None:
    """What was gathered before."""
    model.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="calibrate by what monoquant calibrate gathered with the same options, in place of a "
        "run over --calibration, on which the result is then only measured",
    )


def add_grid(grid: _ArgumentGroup) -> None:
    """How weights are quantized."""
    grid.add_argument("--bits", type=int, help="2 to 8, or 16 for a cast (default: 8)")
    grid.add_argument(
        "--quality",
        choices=tuple(QUALITIES),
        help="choose grid, ranges and rounding where nothing else is said of them: fast needs no "
        "data; the others learn from --calibration",
    )
    symmetry = grid.add_mutually_exclusive_group()
    symmetry.add_argument(
        "--symmetric", action="store_const", const=True, help="no zero point (default at 8 bits)"
    )
    symmetry.add_argument(
        "--asymmetric",
        dest="symmetric",
        action="store_const",
        const=False,
        help="a zero point for each scale (default below 8 bits)",
    )
    grid.add_argument(
        "--granularity", metavar="KIND", help="what shares a scale: tensor, channel or group"
    )
    grid.add_argument("--group-size", type=int, metavar="N", help="values in a group (default: 64)")
    grid.add_argument("--scale-dtype", metavar="DTYPE", help="float16, bfloat16 or float32")
    grid.add_argument(
        "--float-zero-point",
        action="store_const",
        const=True,
        help="zero points are floats in the dtype of the scales, as --rounding hqq wants them",
    )
    grid.add_argument(
        "--outliers",
        nargs="?",
        const=OutlierColumns.kind,
        metavar="N",
        help="keep N columns of each weight in float16; without a number those that stand out, or "
        "outlier_columns:times=10,at_most=4",
    )
    grid.add_argument(
        "--scheme",
        metavar="STRATEGY",
        help="a whole grid in place of the above: nf4, fp8, mxfp4, nvfp4, fitted_codebook:bits=3, "
        "nf4:group_size=32, ...",
    )
    grid.add_argument(
        "--observer", metavar="STRATEGY", help="how ranges are found: minmax, mse, auto, ..."
    )
    grid.add_argument(
        "--rounding",
        metavar="STRATEGY",
        help="how grid points are chosen: round_to_nearest (default), hqq; with --calibration "
        "gptq, learned:steps=100, ...",
    )


def add_inputs(inputs: _ArgumentGroup) -> None:
    """How inputs of layers are quantized, and what is changed around them."""
    modes = inputs.add_mutually_exclusive_group()
    modes.add_argument(
        "--activations",
        choices=("dynamic", "static", "float"),
        help="how inputs of layers are quantized (default at 8 bits: static with --calibration, "
        "dynamic without; otherwise float)",
    )
    modes.add_argument(
        "--dynamic",
        dest="activations",
        action="store_const",
        const="dynamic",
        help="the same as --activations dynamic",
    )
    inputs.add_argument("--activation-bits", type=int, metavar="N", help="2 to 8 (default: 8)")
    inputs.add_argument(
        "--activation-symmetric",
        action="store_const",
        const=True,
        help="no zero point for inputs (default: one)",
    )
    inputs.add_argument(
        "--activation-granularity", metavar="KIND", help="what shares a scale: token or tensor"
    )
    inputs.add_argument(
        "--activation-dtype",
        metavar="DTYPE",
        help="float8_e4m3fn or float8_e5m2: inputs as floats of 8 bits (default: integers)",
    )
    inputs.add_argument(
        "--activation-observer",
        metavar="STRATEGY",
        help="how ranges of static inputs are found (default: as --observer)",
    )
    inputs.add_argument(
        "--fold",
        action=BooleanOptionalAction,
        help="fold batch normalizations first (default: where inputs are quantized); --no-fold "
        "also leaves activations apart from their layers",
    )
    inputs.add_argument(
        "--transform",
        action="append",
        default=[],
        metavar="STRATEGY",
        help="awq, smooth_quant:alpha=0.5, equalize_layers, bias_correction, ...; repeatable",
    )
    inputs.add_argument(
        "--on-damage",
        choices=("warn", "keep", "error"),
        help="what happens where a layer is destroyed (default: warn)",
    )


def add_graph(command: ArgumentParser | _ArgumentGroup) -> None:
    """Write the model as a graph."""
    command.add_argument(
        "--graph",
        action="store_true",
        help="run the model as a graph whose layers pass codes on, and measure that; files hold "
        "the model that keeps its class, of which integer_flow makes the graph in Python",
    )


def add_layers(layers: _ArgumentGroup) -> None:
    """Which layers."""
    layers.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="quantize nothing but these; repeatable",
    )
    layers.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave these in float; repeatable",
    )
    layers.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="PATTERN=BITS",
        help="quantize these otherwise, or PATTERN:bits=8,group_size=32; repeatable, the last wins",
    )


def add_kinds(layers: _ArgumentGroup) -> None:
    """Which kinds of layers are known."""
    layers.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="STRATEGY",
        help="ask this layer quantizer or container before the built-in ones: "
        "linear:own_forward=true, linear_like:class_name=package.module.Class, ...; repeatable",
    )


def add_speed(layers: _ArgumentGroup) -> None:
    """Only what gets faster."""
    layers.add_argument(
        "--only-if-faster",
        action="store_true",
        help="measure every layer on --example, and leave in float what is no faster quantized",
    )
    layers.add_argument(
        "--example",
        type=Path,
        metavar="FILE",
        help="a batch such as the model will be called with, in a file as --calibration reads it; "
        "the first one where there are several",
    )
    layers.add_argument(
        "--margin",
        type=float,
        metavar="SHARE",
        help=f"how much faster a layer has to be (default: {NO_DIFFERENCE})",
    )


def add_quiet(command: ArgumentParser | _ArgumentGroup) -> None:
    """Say nothing."""
    command.add_argument("--quiet", action="store_true", help="say nothing but errors")


def add_html(command: ArgumentParser | _ArgumentGroup) -> None:
    """Say where the report goes as a page."""
    command.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write the report there, as one page with pictures that needs no network",
    )
