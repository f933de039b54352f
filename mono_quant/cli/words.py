"""What mends an error or is advised, in the options of the command line."""

import ast
import json
import re
import shlex
from collections.abc import Callable, Mapping

import attrs

from mono_quant.configurable import Config, Json, registered
from mono_quant.errors import Mend
from mono_quant.report import Report

OPTIONS = {
    Mend.SAMPLES: "say how many with --samples N",
    Mend.FORWARD: "if it is called another way, say how with --forward package.module:callable, "
    "a function of (model, batch)",
    Mend.OUTPUT: "return one with --forward package.module:callable, a function of (model, batch)",
    Mend.BATCH: "leave it out of the file of data",
    Mend.TUPLE: "save a list to the file of data: [(inputs, labels)] for one batch, or one of "
    "several batches",
    Mend.DATA: "give some with --calibration FILE",
    Mend.DATA_OR_DYNAMIC: "give some with --calibration FILE, or say --activations dynamic",
    Mend.STATISTICS: "gather them with the same options: monoquant calibrate",
    Mend.NO_STATIC: "leave --activations static out; of a bare checkpoint, name its model with "
    "--factory package.module:callable",
    Mend.COPY: "leave --in-place out",
    Mend.GRID: "give it another grid, or round it otherwise with --override "
    "{layer}:rounding=round_to_nearest",
    Mend.ROUNDING: "leave it out with --skip {layer}, or give it another rounding with "
    "--override PATTERN:rounding=KIND",
    Mend.SKIP: "mend the weight, or leave the layer in float with --skip {layer}",
    Mend.SUFFIX: "rename it",
    Mend.LAYER: "--import the module of one that does, or name it with --layer",
    Mend.IS_QUANTIZED: "monoquant info tells what it holds",
    Mend.IS_FLOAT: "a float checkpoint is quantized first, with monoquant quantize",
}


def in_options(text: str) -> str:
    """Return advice with options in place of calls of `Quantizer`, as far as there are options.

    Args:
        text: of a report or an error, in which calls are written as they are typed.
    """
    parts: list[str] = []
    done = 0
    for found in _CALLED.finditer(text):
        call, end = _call(text, found.start())
        option = _SAID[found[1]](call) if call is not None else None
        if option is not None and found.start() >= done:
            parts += [text[done : found.start()], option]
            done = end
    plain = "".join(parts) + text[done:]
    return _IN_PLACE.sub(r"\1, \2 with --in-place", plain)


def data_in_options(data: Json) -> Json:
    """Return JSON data with every text in it worded so, keys apart."""
    if isinstance(data, str):
        return in_options(data)
    if isinstance(data, Mapping):
        return {key: data_in_options(value) for key, value in data.items()}
    return [data_in_options(one) for one in data] if isinstance(data, list | tuple) else data


def report_in_options(report: Config) -> Config:
    """Return a report as JSON data with its advice worded so."""
    return {name: data_in_options(value) for name, value in report.items()}


def report_worded(report: Report) -> Report:
    """Return a report whose texts advise options."""
    rows = (
        attrs.evolve(
            row,
            reason=in_options(row.reason) if row.reason is not None else None,
            activation=in_options(row.activation) if row.activation is not None else None,
            note=in_options(row.note) if row.note is not None else None,
        )
        for row in report.layers
    )
    return attrs.evolve(
        report,
        layers=tuple(rows),
        warnings=tuple(map(in_options, report.warnings)),
        notes=tuple(map(in_options, report.notes)),
        changes=tuple(attrs.evolve(one, text=in_options(one.text)) for one in report.changes),
    )


def _call(text: str, start: int) -> tuple[ast.Call | None, int]:
    """Return the call that begins somewhere in a text, and where it ends."""
    end = text.find(")", start)
    while end >= 0:
        try:
            found = ast.parse(text[start : end + 1], mode="eval").body
        except SyntaxError:  # the bracket closes another, or lies in a name
            end = text.find(")", end + 1)
            continue
        return (found, end + 1) if isinstance(found, ast.Call) else (None, end + 1)
    return None, start


def _override(call: ast.Call) -> str | None:
    values = {one.arg: _value(one.value) for one in call.keywords}
    if len(call.args) != 1 or not values or None in values.values():
        return None
    said = ",".join(f"{name}={value}" for name, value in values.items())
    return f"--override {shlex.quote(f'{_pattern(call)}:{said}')}"


def _pattern(call: ast.Call) -> str:
    given = ast.literal_eval(call.args[0])
    return "PATTERN" if given is Ellipsis else str(given)


def _value(node: ast.expr) -> str | None:
    """Return a value as an option takes it: that of a literal, the kind of a strategy."""
    match node:
        case ast.Constant(str(text)):
            return text
        case ast.Constant(int(value) | float(value)):
            return json.dumps(value)
        case ast.Call(ast.Name(name), [], []):
            kinds = {cls.__name__: kind for kind, cls in registered().items()}
            return kinds.get(name)
    return None


def _only_argument(call: ast.Call) -> object:
    """Return the only argument of a call, a literal; a call without one for any other."""
    if len(call.args) == 1 and not call.keywords and isinstance(call.args[0], ast.Constant):
        return call.args[0].value
    return call


def _choice(option: str, none: str = "") -> Callable[[ast.Call], str | None]:
    def say(call: ast.Call) -> str | None:
        given = _only_argument(call)
        if given is None and none:
            return f"{option} {none}"
        return f"{option} {shlex.quote(given)}" if isinstance(given, str) else None

    return say


def _skip(call: ast.Call) -> str | None:
    return f"--skip {shlex.quote(_pattern(call))}" if _only_argument(call) is not call else None


def _fit(call: ast.Call) -> str | None:
    return "--calibration FILE" if ast.unparse(call) == "fit(data)" else None


def _validate(call: ast.Call) -> str | None:
    return "--example FILE" if ast.unparse(call) == "validate(example=...)" else None


def _quantize(call: ast.Call) -> str | None:
    return "monoquant quantize" if ast.unparse(call) == "quantize(...)" else None


def _require(call: ast.Call) -> str | None:
    values = {one.arg: _value(one.value) for one in call.keywords}
    if call.args or not values or None in values.values():
        return None
    return " ".join(f"--require-{name} {value}" for name, value in values.items())


def _flag(option: str) -> Callable[[ast.Call], str | None]:
    return lambda call: option if not call.args and not call.keywords else None


_SAID: Mapping[str, Callable[[ast.Call], str | None]] = {
    "activations": _choice("--activations", none="float"),
    "asymmetric": _flag("--asymmetric"),
    "fit": _fit,
    "float_zero_point": _flag("--float-zero-point"),
    "graph": _flag("--graph"),
    "on_damage": _choice("--on-damage"),
    "override": _override,
    "quantize": _quantize,
    "require": _require,
    "skip": _skip,
    "validate": _validate,
}
_CALLED = re.compile(rf"\b({'|'.join(_SAID)})\(")
_IN_PLACE = re.compile(r"^(peak memory: .*) for apply, (.*) for apply_$", re.MULTILINE)
