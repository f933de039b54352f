"""The commands, their options and their help."""

from __future__ import annotations

from argparse import (
    ArgumentParser,
    BooleanOptionalAction,
    Namespace,
    RawDescriptionHelpFormatter,
    _ArgumentGroup,
    _SubParsersAction,
)
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mono_quant.calibration import DEFAULT_SAMPLES
from mono_quant.cli import commands
from mono_quant.errors import ConfigurationError
from mono_quant.schemes import OutlierColumns
from mono_quant.settings import QUALITIES
from mono_quant.speed import NO_DIFFERENCE
from mono_quant.version import __version__

_PROGRAM = "monoquant"
_EXIT_CODES = """exit codes:
  0    done
  1    the result failed: validation, or what was required of it
  2    usage or bad input
  3    a file or folder could not be read or written
  70   a defect of this program: see where with --debug
  130  interrupted"""

_QUANTIZE = """examples:
  monoquant quantize --model model.pt --bits 8 --dynamic -o small.pt
  monoquant quantize model.safetensors --bits 4 --skip lm_head -o small.safetensors
  monoquant quantize model.pt --factory my_package.models:make --bits 4 --group-size 32 \\
      --override 'head=8' --observer mse:steps=100 --calibration batches.pt -o small.safetensors
  monoquant quantize model.pt --bits 4 --plan
  monoquant quantize --bits 4 --skip head --dump-config > four.json

Layers are named by patterns: 'blocks.*.attention' means that module and all below it, and
type:Linear means every torch.nn.Linear (type:package.module:Class any other class).
A strategy is KIND, KIND:name=value,... or a JSON object: mse, mse:steps=100,
float_cast:dtype=bfloat16, '{"kind": "affine", "bits": 6, "symmetric": false}'."""
_INFO = """examples:
  monoquant info small.safetensors
  monoquant info small.safetensors --json | jq .config"""
_VALIDATE = """examples:
  monoquant validate small.safetensors
  monoquant validate small.safetensors --factory my_package.models:make --example batches.pt"""
_BENCHMARK = """examples:
  monoquant benchmark small.safetensors --factory my_package.models:make --example batches.pt"""
_COMPARE = """examples:
  monoquant compare model.safetensors small.safetensors
  monoquant compare eight.pt four.pt --factory my_package.models:make --calibration batches.pt"""
_DEQUANTIZE = """examples:
  monoquant dequantize small.safetensors -o float.safetensors
  monoquant dequantize small.safetensors -o float.pt"""
_DEMO = """examples:
  pip install "mono-quant[demo]" && monoquant demo
  monoquant demo --output demo-files --json"""


class _Parser(ArgumentParser):
    """A parser whose complaints are errors like all others: one line with the mend."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see {self.prog} --help")


def build_parser() -> ArgumentParser:
    """Return the parser of the whole command line; each command sets `run`."""
    parser = _Parser(
        prog=_PROGRAM,
        description="Post-training quantization for PyTorch: smaller models, the damage known.",
        epilog=f"{_QUANTIZE.partition('  monoquant quantize model.pt --f')[0]}"
        f"  monoquant demo\n\nmonoquant COMMAND --help shows more.\n\n{_EXIT_CODES}",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    known = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_quantize(known)
    _add_info(known)
    _add_validate(known)
    _add_benchmark(known)
    _add_compare(known)
    _add_dequantize(known)
    _add_demo(known)
    return parser


def _add_quantize(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "quantize", commands.quantize, _QUANTIZE)
    model = command.add_argument_group("the model")
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
    _add_factory(model)
    _add_forward(model)
    _add_calibration(model)
    _add_grid(command.add_argument_group("how weights are quantized"))
    _add_inputs(command.add_argument_group("how inputs of layers are quantized, and changes"))
    _add_layers(layers := command.add_argument_group("which layers"))
    _add_speed(layers)
    output = command.add_argument_group("what comes out")
    output.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where to: .safetensors, .pt or .pth"
    )
    output.add_argument(
        "--in-place", action="store_true", help="free float weights on the way: less memory"
    )
    output.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="keep each finished block there, and go on from those of a run that was stopped",
    )
    output.add_argument(
        "--plan",
        "--dry-run",
        dest="dry_run",
        action="store_true",
        help="say what would be done to each layer and why, and write nothing",
    )
    output.add_argument(
        "--no-validate",
        dest="validate",
        action="store_false",
        help="do not reload and run what was saved",
    )
    output.add_argument(
        "--require-coverage",
        type=float,
        metavar="SHARE",
        help="write nothing and fail unless that share of the parameters' bytes is quantized: 0.9",
    )
    output.add_argument(
        "--require-sqnr",
        type=float,
        metavar="DB",
        help="write nothing and fail unless the outputs on --calibration reach so many decibels",
    )
    output.add_argument("--config", type=Path, metavar="FILE", help="begin with this JSON file")
    output.add_argument(
        "--dump-config", action="store_true", help="print such a file, and do nothing else"
    )
    _add_quiet(output)


def _add_grid(grid: _ArgumentGroup) -> None:
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


def _add_inputs(inputs: _ArgumentGroup) -> None:
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


def _add_layers(layers: _ArgumentGroup) -> None:
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


def _add_speed(layers: _ArgumentGroup) -> None:
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


def _add_info(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "info", commands.info, _INFO)
    command.add_argument("file", type=Path, metavar="FILE", help="a quantized file")


def _add_validate(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "validate", commands.validate, _VALIDATE)
    command.add_argument("file", type=Path, metavar="FILE", help="a quantized file")
    _add_factory(command)
    _add_forward(command)
    command.add_argument(
        "--example", type=Path, metavar="FILE", help="a batch to run, as quantize --calibration"
    )


def _add_benchmark(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "benchmark", commands.benchmark, _BENCHMARK)
    command.add_argument("file", type=Path, metavar="FILE", help="a quantized file")
    _add_factory(command)
    _add_forward(command)
    command.add_argument(
        "--example", type=Path, metavar="FILE", help="a batch to run, as quantize --calibration"
    )
    command.add_argument(
        "--seconds", type=float, default=5.0, metavar="N", help="how long to measure (5)"
    )


def _add_compare(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "compare", commands.compare, _COMPARE)
    command.add_argument("reference", type=Path, metavar="A", help="the file that is right")
    command.add_argument("other", type=Path, metavar="B", help="the file that is judged")
    _add_factory(command)
    _add_forward(command)
    _add_calibration(command)


def _add_dequantize(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "dequantize", commands.dequantize, _DEQUANTIZE)
    command.add_argument("file", type=Path, metavar="FILE", help="a quantized file")
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        required=True,
        help="where to: .safetensors, .pt or .pth",
    )
    _add_quiet(command)


def _add_demo(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "demo", commands.demo, _DEMO)
    command.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="keep the files (default: a temporary one)"
    )
    _add_quiet(command)


def _command(
    known: _SubParsersAction[_Parser],
    name: str,
    run: Callable[[Namespace], commands.Outcome],
    examples: str,
) -> _Parser:
    summary = (run.__doc__ or "").partition("\n")[0]
    command = known.add_parser(
        name,
        help=summary[:1].lower() + summary[1:].rstrip("."),
        description=summary,
        epilog=f"{examples}\n\n{_EXIT_CODES}",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run)
    command.add_argument(
        "--json", action="store_true", help="print one JSON object, and nothing else"
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module first, for the kinds that it registers; repeatable",
    )
    return command


def _add_factory(command: ArgumentParser | _ArgumentGroup) -> None:
    command.add_argument(
        "--factory",
        metavar="package.module:callable",
        help="makes the float torch.nn.Module; modules are also looked for in this folder",
    )


def _add_forward(command: ArgumentParser | _ArgumentGroup) -> None:
    command.add_argument(
        "--forward",
        metavar="package.module:callable",
        help="called with (model, batch) where model(batch) will not do",
    )


def _add_calibration(command: ArgumentParser | _ArgumentGroup) -> None:
    command.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="data to run: a .pt of a tensor, of a dictionary (one batch of keyword arguments) or "
        "of a list of batches; or a .safetensors, one batch: a tensor or keyword arguments",
    )
    command.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help=f"go on until this many samples were seen (default: {DEFAULT_SAMPLES})",
    )


def _add_quiet(command: ArgumentParser | _ArgumentGroup) -> None:
    command.add_argument("--quiet", action="store_true", help="say nothing but errors")
