"""The commands, their options and their help."""

from __future__ import annotations

from argparse import (
    ArgumentParser,
    BooleanOptionalAction,
    Namespace,
    RawDescriptionHelpFormatter,
    _SubParsersAction,
)
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from mono_quant.cli import commands
from mono_quant.cli.arguments import (
    add_calibration,
    add_factory,
    add_forward,
    add_graph,
    add_grid,
    add_html,
    add_inputs,
    add_kinds,
    add_layers,
    add_measured,
    add_model,
    add_quiet,
    add_speed,
    add_statistics,
)
from mono_quant.cli.completion import completion_script
from mono_quant.errors import ConfigurationError
from mono_quant.version import __version__

_PROGRAM = "monoquant"
_EXIT_CODES = """exit codes:
  0    done
  1    the result failed: validation, what was required of it, or a law
  2    usage or bad input
  3    a file or folder could not be read or written
  70   a defect of this program: see where with --debug
  130  interrupted"""

_QUANTIZE = """examples:
  monoquant quantize --model model.pt --bits 8 --dynamic -o small.pt
  monoquant quantize model.safetensors --bits 4 --skip lm_head -o small.safetensors
  monoquant quantize model.pt --factory my_package.models:make --bits 4 --group-size 32 \\
      --override 'head=8' --observer mse:steps=100 --calibration batches.pt -o small.safetensors
  monoquant quantize model.pt --bits 4 -o small.pt --html report.html
  monoquant quantize model.pt --factory my_package.models:make --calibration images --graph \\
      -o small.safetensors
  monoquant quantize --bits 4 --skip head --dump-config > four.json
  monoquant quantize model.pt --config four.json --override 'head=8' -o small.pt

Layers are named by patterns: 'blocks.*.attention' means that module and all below it, and
type:Linear means every torch.nn.Linear (type:package.module:Class any other class).
A strategy is KIND, KIND:name=value,... or a JSON object: mse, mse:steps=100,
float_cast:dtype=bfloat16, '{"kind": "affine", "bits": 6, "symmetric": false}'."""
_PLAN = """examples:
  monoquant plan model.pt --bits 4
  monoquant plan model.pt --factory my_package.models:make --bits 4 --skip head --json
  monoquant plan --factory my_package.models:make --only-if-faster --example batch.pt

Takes the options of quantize: see monoquant quantize --help for patterns and strategies."""
_CALIBRATE = """examples:
  monoquant calibrate model.pt --factory my_package.models:make --calibration data --bits 8 \\
      -o statistics.safetensors
  monoquant quantize model.pt --factory my_package.models:make --bits 8 \\
      --statistics statistics.safetensors -o small.safetensors

Takes the options of quantize that say how, since they say whose statistics are asked for."""
_INFO = """examples:
  monoquant info small.safetensors
  monoquant info small.safetensors --html report.html
  monoquant info small.safetensors --json | jq .config"""
_VALIDATE = """examples:
  monoquant validate small.safetensors
  monoquant validate small.safetensors --factory my_package.models:make --example batches.pt"""
_BENCHMARK = """examples:
  monoquant benchmark small.safetensors --factory my_package.models:make --example batches.pt
  monoquant benchmark small.safetensors --factory my_package.models:make --example batches.pt \\
      --graph --seconds 10 --json"""
_COMPARE = """examples:
  monoquant compare model.safetensors small.safetensors
  monoquant compare eight.pt four.pt --factory my_package.models:make --calibration batches.pt"""
_DEQUANTIZE = """examples:
  monoquant dequantize small.safetensors -o float.safetensors
  monoquant dequantize small.safetensors -o float.pt"""
_CHECK = """examples:
  monoquant check my_package.schemes:MyScheme
  monoquant check tests.extensions:EXPERTS --json

A class that needs no argument, an instance, or a LayerCase, ContainerCase, KernelCase,
TransformCase or CorrectionCase of mono_quant.testing, which say what such a one is checked on.
Exit code 1 says that a law is broken."""
_COMPLETION = """examples:
  monoquant completion > ~/.monoquant-completion
  echo 'source ~/.monoquant-completion' >> ~/.bashrc"""
_DEMO = """examples:
  pip install -c constraints.txt ".[demo]" && monoquant demo
  monoquant demo --output demo-files --json"""


class _Parser(ArgumentParser):
    """A parser whose complaints are errors like all others: one line with the mend."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see {self.prog} --help")


def parse(words: Sequence[str]) -> Namespace:
    """Return what a command line says; its `run` is what to do.

    Raises:
        ConfigurationError: it cannot be understood; names the command whose help tells more.
    """
    parser, known = parsers()
    given, unknown = parser.parse_known_args(words)
    if not unknown:
        return given
    command = next(word for word in words if word in known)
    wrong = unknown[0].partition("=")[0]
    what, mend, asked = f"{command} has no option {wrong}", "", command
    if wrong.removeprefix("--") in known:
        asked = wrong.removeprefix("--")
        mend = f", which is a command: {_PROGRAM} {asked}"
    elif near := get_close_matches(wrong, known[command]._option_string_actions, 1, 0.85):
        mend = f"; is {near[0]} meant?"
    else:
        what = f"unrecognized arguments: {' '.join(unknown)}"
    raise ConfigurationError(f"{what}{mend}; see {_PROGRAM} {asked} --help")


def parsers() -> tuple[ArgumentParser, Mapping[str, ArgumentParser]]:
    """Return the parser of the whole command line, and those of its commands by name."""
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
    _add_plan(known)
    _add_calibrate(known)
    _add_info(known)
    _add_validate(known)
    _add_benchmark(known)
    _add_compare(known)
    _add_dequantize(known)
    _add_check(known)
    _add_demo(known)
    _add_completion(known)
    return parser, known.choices


def _add_quantize(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "quantize", commands.quantize, _QUANTIZE)
    _add_how(command)
    output = command.add_argument_group("what comes out")
    output.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="where to: .safetensors, .pt or .pth; without it, only --dump-config has a use",
    )
    output.add_argument(
        "--in-place", action="store_true", help="free float weights on the way: less memory"
    )
    output.add_argument(
        "--sequential",
        action=BooleanOptionalAction,
        help="calibrate each block of layers on what the quantized blocks before it make of the "
        "data (default: where the rounding wants it)",
    )
    output.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="keep each finished block there, and go on from those of a run that was stopped",
    )
    add_html(output)
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
    output.add_argument(
        "--dump-config",
        action="store_true",
        help="print all that was said as JSON, for --config, and do nothing else",
    )
    add_quiet(output)


def _add_plan(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "plan", commands.plan, _PLAN)
    _add_how(command)
    add_quiet(command)


def _add_calibrate(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "calibrate", commands.calibrate, _CALIBRATE)
    _add_how(command, of_a_run=False)
    command.add_argument(
        "-o", "--output", type=Path, metavar="FILE", required=True, help="where to: .safetensors"
    )
    add_quiet(command)


def _add_how(command: ArgumentParser, *, of_a_run: bool = True) -> None:
    """Add what says which model, how it is to be quantized, and what only a run can use."""
    model = command.add_argument_group("the model")
    add_model(model)
    if of_a_run:
        add_statistics(model)
        add_measured(model)
    add_grid(command.add_argument_group("how weights are quantized"))
    inputs = command.add_argument_group("how inputs of layers are quantized, and changes")
    add_inputs(inputs)
    if of_a_run:
        add_graph(inputs)
    layers = command.add_argument_group("which layers")
    add_layers(layers)
    add_kinds(layers)
    if of_a_run:
        add_speed(layers)
    command.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="begin with this JSON or TOML file (.toml); options add to it",
    )


def _add_info(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "info", commands.info, _INFO)
    command.add_argument("file", type=Path, metavar="FILE", help="a quantized file")
    add_html(command)


def _add_validate(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "validate", commands.validate, _VALIDATE)
    command.add_argument("file", type=Path, metavar="FILE", help="a quantized file")
    add_factory(command)
    add_forward(command)
    command.add_argument(
        "--example", type=Path, metavar="FILE", help="a batch to run, as quantize --calibration"
    )


def _add_benchmark(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "benchmark", commands.benchmark, _BENCHMARK)
    command.add_argument("file", type=Path, metavar="FILE", help="a quantized file")
    add_factory(command)
    add_forward(command)
    command.add_argument(
        "--example", type=Path, metavar="FILE", help="a batch to run, as quantize --calibration"
    )
    add_graph(command)
    command.add_argument(
        "--seconds", type=float, default=5.0, metavar="N", help="how long to measure (5)"
    )


def _add_compare(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "compare", commands.compare, _COMPARE)
    command.add_argument("reference", type=Path, metavar="A", help="the file that is right")
    command.add_argument("other", type=Path, metavar="B", help="the file that is judged")
    add_factory(command)
    add_forward(command)
    add_calibration(command)


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
    add_quiet(command)


def _add_check(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "check", commands.check, _CHECK)
    command.add_argument(
        "target",
        metavar="package.module:name",
        help="what to check; modules are also looked for in this folder",
    )


def _add_demo(known: _SubParsersAction[_Parser]) -> None:
    command = _command(known, "demo", commands.demo, _DEMO)
    command.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="keep the files (default: a temporary one)"
    )
    add_quiet(command)


def _add_completion(known: _SubParsersAction[_Parser]) -> None:
    def completion(given: Namespace) -> commands.Outcome:
        """Print a script by which bash and zsh complete commands, options and choices."""
        script = completion_script(_PROGRAM, known.choices)
        return commands.Outcome(script, {"script": script})

    _command(known, "completion", completion, _COMPLETION)


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
