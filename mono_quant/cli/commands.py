"""What each command does: it hands words on and brings back what the API says."""

import json
import sys
from argparse import Namespace
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import attrs
from torch import nn

from mono_quant.api import load_model
from mono_quant.benchmark import measure_speed
from mono_quant.builder import Builder
from mono_quant.cli.inputs import (
    data_of,
    factory_of,
    float_model,
    forward_of,
    import_module,
    imported,
    model_path,
    read_data,
    samples_of,
)
from mono_quant.cli.options import (
    BenchmarkOptions,
    CalibrateOptions,
    CheckOptions,
    CompareOptions,
    DemoOptions,
    DequantizeOptions,
    InfoOptions,
    ModelOptions,
    PlanOptions,
    QuantizeOptions,
    ValidateOptions,
)
from mono_quant.cli.values import build_quantizer
from mono_quant.cli.words import in_options, report_in_options, report_worded
from mono_quant.comparison import compare_files
from mono_quant.configurable import Config
from mono_quant.demo.run import run_demo
from mono_quant.errors import ConfigurationError, RequirementError
from mono_quant.files import describe_file, float_state_dict, validate_file
from mono_quant.flow import integer_flow
from mono_quant.modules import BareModule
from mono_quant.plan import GraphPlan, GraphResult, Plan
from mono_quant.plan.written import GRAPH
from mono_quant.progress import telling
from mono_quant.quantizer import GraphQuantizer, Quantizer
from mono_quant.report import Report
from mono_quant.result import QuantizationResult, Validation
from mono_quant.serializers import read_checkpoint, serializer_for, write_state_dict
from mono_quant.speed import NO_DIFFERENCE
from mono_quant.testing import check as check_laws
from mono_quant.text import format_bytes

BuilderT = TypeVar("BuilderT", bound=Builder)

OK = 0
FAILED = 1


@attrs.frozen
class Outcome:
    """What a command has to say.

    Attributes:
        text: for people.
        data: for ``--json``.
        problem: what failed, where something did.
    """

    text: str
    data: Config
    problem: str | None = None

    @property
    def code(self) -> int:
        """The exit code."""
        return OK if self.problem is None else FAILED


def quantize(given: Namespace) -> Outcome:
    """Quantize a model, save it, and see that what was saved is right."""
    options = QuantizeOptions(**vars(given))
    _import_all(options)
    quantizer = build_quantizer(options)
    if options.dump_config:
        config = quantizer.to_config()
        return Outcome(_json_text(config), config)
    output = _checked_output(options.output, model_path(options))
    _checked_page(options.html, options.output, model_path(options))
    if options.sequential and options.statistics is not None:
        raise ConfigurationError(
            "--statistics are of the inputs of float layers, and --sequential asks for those that "
            "quantized layers make: leave one of the two out"
        )
    result = _run(quantizer, options)
    if (short := _short_of(result.report, options)) is not None:
        shown = {"report": report_in_options(result.report.to_dict()), "config": result.plan.config}
        return Outcome("" if options.quiet else in_options(str(result.report)), shown, short)
    with _progress(f"saving {output.name}", options):
        saved = result.save(output)
    size = saved.stat().st_size
    lines = [in_options(str(result.report)), "", f"saved {saved} ({format_bytes(size)})"]
    page = _page(result.report, options.html, saved)
    lines += [f"report: {page[name]}" for name in page]
    answer: dict[str, Config | str | int] = {
        "output": str(saved),
        "file_bytes": size,
        "report": report_in_options(result.report.to_dict()),
        "config": result.plan.config,
        **page,
    }
    problem = None
    if options.only_if_faster and not result.report.quantized:
        lines.append("nothing is faster quantized: the file holds the float model")
    elif options.validate:
        with _progress(f"checking {saved.name}", options):
            validation = result.validate(path=saved)
        lines.append(in_options(f"validation: {validation}"))
        answer["validation"] = _validation(validation)
        problem = _problem(saved, validation)
    return Outcome("" if options.quiet else "\n".join(lines), answer, problem)


def plan(given: Namespace) -> Outcome:
    """Say what would be done to each layer and why, and what that takes; write nothing."""
    options = PlanOptions(**vars(given))
    _import_all(options)
    found = _planned(build_quantizer(options), options)
    if isinstance(found, Plan):
        found = found.measured(progress=not options.quiet)
    outline, time = found.outline, found.estimate_time()
    answer: Config = {
        "plan": report_in_options(outline.report.to_dict()),
        "peak_bytes": outline.peak_bytes,
        "peak_bytes_in_place": outline.peak_bytes_in_place,
        "time": time.to_dict(),
        "config": outline.config,
    }
    text = f"{found.explain()}\n\n{time}"
    return Outcome("" if options.quiet else in_options(text), answer)


def calibrate(given: Namespace) -> Outcome:
    """Gather what the data tells of the inputs of layers, for later runs of quantize."""
    untold = dict.fromkeys(("measure_on", "statistics", "example", "margin"))
    options = CalibrateOptions(**untold, only_if_faster=False, graph=False, **vars(given))
    _import_all(options)
    if options.calibration is None:
        raise ConfigurationError("what is gathered is gathered from data: add --calibration FILE")
    planned = _planned(build_quantizer(options), options)
    if isinstance(planned, GraphPlan):
        raise ConfigurationError(
            "a graph calibrates what passes between layers too, which statistics do not hold: "
            f"take {GRAPH!r} out of the configuration"
        )
    found = planned.calibrate(progress=not options.quiet)
    if not found.weights:
        raise ConfigurationError(
            "nothing is asked of the data: inputs that are calibrated (--activations static) and "
            "roundings that look at them (--rounding gptq) are"
        )
    saved = found.save(_checked_output(options.output, model_path(options)))
    size = saved.stat().st_size
    text = f"saved {saved} ({format_bytes(size)}, the inputs of {len(found.weights)} weights)"
    answer: Config = {
        "output": str(saved),
        "file_bytes": size,
        "weights": [".".join(filter(None, key)) for key in found.weights],
    }
    return Outcome("" if options.quiet else text, answer)


_Planned = Plan[nn.Module] | Plan[BareModule] | GraphPlan[nn.Module]


def _planned(quantizer: Quantizer | GraphQuantizer, options: PlanOptions) -> _Planned:
    """Return the plan for the model that the options name, which nobody else holds.

    So `--in-place` can free the tensors of a bare checkpoint.
    """
    model = float_model(options)
    if isinstance(quantizer, Quantizer):
        return _with_data(quantizer, options, runs=isinstance(model, nn.Module)).plan(model)
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            "--graph follows the model's code, and a bare checkpoint has none: "
            "add --factory package.module:name"
        )
    return _with_data(quantizer, options, runs=True).plan(model)


def _run(
    quantizer: Quantizer | GraphQuantizer, options: QuantizeOptions
) -> QuantizationResult[nn.Module] | QuantizationResult[BareModule] | GraphResult[nn.Module]:
    """Return what becomes of the model that the options name."""
    planned = _planned(quantizer, options)
    if isinstance(planned, Plan):
        return planned.run(
            in_place=options.in_place,
            sequential=options.sequential,
            resume=options.resume,
            progress=not options.quiet,
        )
    asked = {
        "--in-place": options.in_place,
        "--sequential": options.sequential,
        "--resume": options.resume,
    }
    for name, value in asked.items():
        if value:
            raise ConfigurationError(f"{name} does not go together with --graph; leave one out")
    return planned.run(progress=not options.quiet)


def _progress(
    label: str, options: QuantizeOptions | DequantizeOptions
) -> AbstractContextManager[None]:
    """Return a context in which going through files shows a bar, unless all is to be quiet."""
    return telling(None if options.quiet else label)


def _short_of(report: Report, options: QuantizeOptions) -> str | None:
    """Return in what a report falls short of what is required, or None."""
    if options.require_coverage is None and options.require_sqnr is None:
        return None
    try:
        report.require(coverage=options.require_coverage, sqnr=options.require_sqnr)
    except RequirementError as error:
        return f"nothing was written: {in_options(str(error))}"
    return None


def _with_data(quantizer: BuilderT, options: PlanOptions, *, runs: bool) -> BuilderT:
    """Return the quantizer with the data and the example that the options name."""
    named = {
        "--calibration": options.calibration,
        "--measure-on": options.measure_on,
        "--statistics": options.statistics,
        "--example": options.example,
    }
    said = [name for name, path in named.items() if path is not None]
    if said and not runs:
        raise ConfigurationError(
            f"{said[0]} runs the model, and a bare checkpoint cannot be run: "
            "add --factory package.module:name"
        )
    run = (options.calibration, options.measure_on, options.example)
    if options.forward is not None and not any(run):
        raise ConfigurationError("--forward calls the model with --calibration; add that")
    if options.samples is not None and options.calibration is None:
        raise ConfigurationError("--samples counts those of --calibration; add that")
    if options.only_if_faster != (options.example is not None):
        raise ConfigurationError(
            "--only-if-faster measures layers on a batch: add --example FILE"
            if options.only_if_faster
            else "--example is what --only-if-faster measures on; add that"
        )
    if options.margin is not None and not options.only_if_faster:
        raise ConfigurationError("--margin says how much faster; add --only-if-faster")
    if options.calibration is not None:
        quantizer = quantizer.fit(
            read_data(options.calibration),
            samples=samples_of(options.samples),
            forward=forward_of(options),
        )
    if options.measure_on is not None:
        quantizer = quantizer.measure_on(read_data(options.measure_on), forward=forward_of(options))
    if options.statistics is not None:
        quantizer = quantizer.statistics(options.statistics)
    if options.example is not None:
        quantizer = quantizer.only_if_faster(
            data_of(options.example, options, 1).first(),
            margin=NO_DIFFERENCE if options.margin is None else options.margin,
            forward=forward_of(options),
        )
    return quantizer


def info(given: Namespace) -> Outcome:
    """Show what a quantized file says of itself."""
    options = InfoOptions(**vars(given))
    _import_all(options)
    _checked_page(options.html, options.file)
    found = describe_file(options.file)
    page = _page(found.report, options.html, options.file)
    told = [in_options(str(found)), *(f"\nreport: {page[name]}" for name in page)]
    return Outcome("\n".join(told), {**found.to_dict(), **page})


def validate(given: Namespace) -> Outcome:
    """Reload a quantized file, and run it where there is a model and an example."""
    options = ValidateOptions(**vars(given))
    _import_all(options)
    make = factory_of(options)
    if options.example is not None and make is None:
        raise ConfigurationError("--example is run through a model: add --factory")
    example = data_of(options.example, options, 1) if options.example is not None else None
    with telling(f"checking {options.file.name}"):
        found = validate_file(options.file, make() if make is not None else None, example)
    answer: Config = {"path": str(options.file), **_validation(found)}
    return Outcome(in_options(str(found)), answer, _problem(options.file, found))


def benchmark(given: Namespace) -> Outcome:
    """Measure the speed of a quantized file's model beside the float one."""
    options = BenchmarkOptions(**vars(given))
    _import_all(options)
    make = factory_of(options)
    if make is None or options.example is None:
        raise ConfigurationError(
            "what is measured is a model on a batch: add --factory package.module:name and "
            "--example FILE"
        )
    example = data_of(options.example, options, 1)
    with telling(f"reading {options.file.name}"):
        model = load_model(options.file, make())
    if options.graph:
        model = integer_flow(model).model
    found = measure_speed(make(), model, example, options.seconds, "measuring")
    return Outcome(str(found), {"path": str(options.file), **found.to_dict()})


def compare(given: Namespace) -> Outcome:
    """Compare two files, quantized or float."""
    options = CompareOptions(**vars(given))
    _import_all(options)
    make = factory_of(options)
    if options.calibration is not None and make is None:
        raise ConfigurationError("--calibration is run through a model: add --factory")
    data = None
    if options.calibration is not None:
        data = data_of(options.calibration, options, options.samples)
    with telling("comparing"):
        found = compare_files(options.reference, options.other, make, data)
    sizes = [path.stat().st_size for path in (options.reference, options.other)]
    shown = " -> ".join(map(format_bytes, sizes))
    answer = {
        "reference": str(options.reference),
        "other": str(options.other),
        "reference_file_bytes": sizes[0],
        "file_bytes": sizes[1],
        **found.to_dict(),
    }
    return Outcome(f"files: {shown}\ntensors: {found}", answer)


def dequantize(given: Namespace) -> Outcome:
    """Write the float state dict of a quantized file."""
    options = DequantizeOptions(**vars(given))
    _import_all(options)
    output = _checked_output(options.output, options.file)
    with _progress(f"reading {options.file.name}", options):
        checkpoint = read_checkpoint(options.file)
    if not checkpoint.records:
        raise ConfigurationError(f"{options.file} is float already")
    tensors = float_state_dict(checkpoint)
    write_state_dict(output, tensors)
    size = output.stat().st_size
    text = f"saved {output} ({format_bytes(size)}, {len(tensors)} tensors)"
    answer: Config = {"output": str(output), "file_bytes": size, "tensors": len(tensors)}
    return Outcome("" if options.quiet else text, answer)


def check(given: Namespace) -> Outcome:
    """Say which laws of its kind an extension keeps, and what breaks the others."""
    options = CheckOptions(**vars(given))
    _import_all(options)
    with telling("checking"):
        found = check_laws(imported(options.target))
    broken = ", ".join(one.law for one in found.broken)
    problem = f"{found.subject} breaks {broken}" if broken else None
    return Outcome(str(found), found.to_dict(), problem)


def demo(given: Namespace) -> Outcome:
    """Quantize a real sentence encoder and measure what that does."""
    options = DemoOptions(**vars(given))
    found = run_demo(options.output, progress=not options.quiet and sys.stderr.isatty())
    failed = [run.name for run in found.variants if run.validation != "valid"]
    problem = f"{', '.join(failed)} failed validation" if failed else None
    return Outcome("" if options.quiet else str(found), found.to_dict(), problem)


def _checked_page(page: Path | None, *others: Path | None) -> None:
    """Refuse a page that cannot be written, or would replace another file, before work is done."""
    if page is None:
        return
    if not page.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {page.parent} for {page.name}; make it")
    for other in others:
        if other is not None and page.resolve() == other.resolve():
            raise ConfigurationError(f"--html {page} is the model's file; write to another file")


def _page(report: Report, page: Path | None, of: Path) -> dict[str, str]:
    """Write a report as a page, its advice in options, and return where; nothing if not asked."""
    if page is None:
        return {}
    report_worded(report).to_html(page, title=f"Quantization report: {of.name}")
    return {"html": str(page)}


def _import_all(options: ModelOptions) -> None:
    for name in options.imports:
        import_module(name)


def _checked_output(output: Path | None, source: Path | None) -> Path:
    """Return where to write, once it is seen that one can."""
    if output is None:
        raise ConfigurationError("say where to write: --output FILE (.safetensors, .pt or .pth)")
    serializer_for(output)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} for {output.name}; make it")
    if source is not None and output.exists() and source.exists() and output.samefile(source):
        raise ConfigurationError(f"{output} is the input itself; write to another file")
    return output


def _validation(found: Validation) -> dict[str, Config | str]:
    return {
        "status": found.status,
        "checks": {check: in_options(seen) for check, seen in found.checks},
    }


def _problem(path: Path, found: Validation) -> str | None:
    if found.status != "failed":
        return None
    what, seen = found.checks[-1]
    return f"{path} failed validation: {what}: {seen}"


def _json_text(config: Config) -> str:
    return json.dumps(config, indent=2)
