"""How the options of ``monoquant quantize`` become the calls of the builder."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from mono_quant import (
    AWQ,
    GPTQ,
    HQQ,
    MSE,
    Affine,
    BiasCorrection,
    Codebook,
    EqualizeLayers,
    FittedCodebook,
    Float8,
    FloatCast,
    LearnedRounding,
    LinearLikeQuantizer,
    LinearQuantizer,
    Microscaling,
    MinMax,
    OutlierColumns,
    Outliers,
    PerGroup,
    Quantizer,
    RoundToNearest,
    SmoothQuant,
    load_model,
)
from mono_quant.cli.values import _IN_OVERRIDE
from mono_quant.layers.containers import TransformerEncoderContainer
from tests.cli.conftest import SMALL, Monoquant
from tests.cli.networks import small
from tests.helpers import same_tensors

AFFINE_JSON = '{"kind": "affine", "bits": 6, "granularity": {"kind": "per_group", "size": 32}}'


@pytest.mark.parametrize(
    ("words", "quantizer"),
    [
        ([], Quantizer()),
        (["--bits", "4"], Quantizer().bits(4)),
        (["--symmetric"], Quantizer().symmetric()),
        (["--asymmetric"], Quantizer().asymmetric()),
        (["--granularity", "tensor"], Quantizer().granularity("tensor")),
        (["--granularity", "per_group:size=32"], Quantizer().granularity(PerGroup(32))),
        (["--group-size", "32"], Quantizer().group_size(32)),
        (["--granularity", "group", "--group-size", "32"], Quantizer().group_size(32)),
        (["--scale-dtype", "bfloat16"], Quantizer().scale_dtype(torch.bfloat16)),
        (["--scheme", "float_cast:dtype=bfloat16"], Quantizer().scheme(FloatCast(torch.bfloat16))),
        (["--scheme", "affine:bits=5"], Quantizer().scheme(Affine(5))),
        (["--scheme", "nf4"], Quantizer().scheme(Codebook.nf4())),
        (
            ["--scheme", "nf4:group_size=32,scale_dtype=float8_e4m3fn"],
            Quantizer().scheme(Codebook.nf4(PerGroup(32), torch.float8_e4m3fn)),
        ),
        (["--scheme", "fp8:dtype=float8_e5m2"], Quantizer().scheme(Float8(torch.float8_e5m2))),
        (["--scheme", "mxfp4"], Quantizer().scheme(Microscaling.mxfp4())),
        (["--scheme", "mxfp6:element=e2m3"], Quantizer().scheme(Microscaling.mxfp6("e2m3"))),
        (["--scheme", "mxfp8"], Quantizer().scheme(Microscaling.mxfp8())),
        (["--scheme", "nvfp4"], Quantizer().scheme(Microscaling.nvfp4())),
        (
            ["--scheme", "fitted_codebook:bits=3,group_size=16"],
            Quantizer().scheme(FittedCodebook(3, PerGroup(16))),
        ),
        (["--override", "a:scheme=nf4"], Quantizer().override("a", scheme=Codebook.nf4())),
        (["--scheme", AFFINE_JSON], Quantizer().scheme(Affine(6, granularity=PerGroup(32)))),
        (["--outliers"], Quantizer().outliers()),
        (["--bits", "4", "--outliers", "3"], Quantizer().bits(4).outliers(3)),
        (
            ["--outliers", "outlier_columns:times=10,at_most=4"],
            Quantizer().outliers(OutlierColumns(10, 4)),
        ),
        (
            ["--override", "a:outliers=3", "--override", "b:outliers=outlier_columns"],
            Quantizer().override("a", outliers=3).override("b", outliers=OutlierColumns()),
        ),
        (["--scheme", "outliers:columns=3"], Quantizer().scheme(Outliers(columns=3))),
        (["--observer", "minmax"], Quantizer().observer(MinMax())),
        (
            ["--observer", "mse:steps=100,smallest=0.5"],
            Quantizer().observer(MSE(steps=100, smallest=0.5)),
        ),
        (["--observer", '{"kind": "mse", "steps": 9}'], Quantizer().observer(MSE(steps=9))),
        (["--rounding", "round_to_nearest"], Quantizer().rounding(RoundToNearest())),
        (
            ["--bits", "4", "--float-zero-point", "--rounding", "hqq"],
            Quantizer().bits(4).float_zero_point().rounding(HQQ()),
        ),
        (["--rounding", "gptq:damping=0.05"], Quantizer().rounding(GPTQ(damping=0.05))),
        (
            ["--rounding", "learned:steps=9,tune_floats=false"],
            Quantizer().rounding(LearnedRounding(steps=9, tune_floats=False)),
        ),
        (["--bits", "3", "--quality", "best"], Quantizer().bits(3).quality("best")),
        (["--rounding", "hqq:iterations=5,p=1.0"], Quantizer().rounding(HQQ(5, p=1.0))),
        (
            ["--override", "a:bits=4,float_zero_point=true,rounding=hqq"],
            Quantizer().override("a", bits=4, float_zero_point=True, rounding=HQQ()),
        ),
        (["--only", "a", "--only", "b.*"], Quantizer().only("a", "b.*")),
        (["--skip", "a", "--skip", "b"], Quantizer().skip("a", "b")),
        (["--override", "blocks.*.head=8"], Quantizer().override("blocks.*.head", bits=8)),
        (
            ["--override", "a:bits=8,group_size=32", "--override", "b=16"],
            Quantizer().override("a", bits=8, group_size=32).override("b", bits=16),
        ),
        (
            ["--override", "a:symmetric=false,granularity=tensor,scale_dtype=float32,observer=mse"],
            Quantizer().override(
                "a",
                symmetric=False,
                granularity="tensor",
                scale_dtype=torch.float32,
                observer=MSE(),
            ),
        ),
        (["--dynamic"], Quantizer().activations("dynamic")),
        (["--activations", "float"], Quantizer().activations(None)),
        (
            [
                *("--activations", "dynamic", "--activation-bits", "6", "--activation-symmetric"),
                *("--activation-granularity", "tensor", "--activation-observer", "minmax"),
            ],
            Quantizer()
            .activations("dynamic", bits=6, symmetric=True, granularity="tensor")
            .observer(activations=MinMax()),
        ),
        (
            [
                *("--scheme", "float8", "--activations", "static"),
                *("--activation-dtype", "float8_e5m2"),
            ],
            Quantizer().scheme(Float8()).activations("static", dtype=torch.float8_e5m2),
        ),
        (["--fold"], Quantizer().fold()),
        (["--no-fold"], Quantizer().fold(False)),
        (
            ["--transform", "bias_correction", "--transform", "equalize_layers:sweeps=3"],
            Quantizer().transform(BiasCorrection(), EqualizeLayers(sweeps=3)),
        ),
        (
            ["--transform", "awq", "--transform", "smooth_quant:alpha=0.5"],
            Quantizer().transform(AWQ(), SmoothQuant(0.5)),
        ),
        (["--on-damage", "keep"], Quantizer().on_damage("keep")),
        (
            [
                *("--layer", "linear:own_forward=true"),
                *("--layer", "linear_like:class_name=a.b.C", "--layer", "transformer_encoder"),
            ],
            Quantizer().layer(
                LinearQuantizer(own_forward=True),
                LinearLikeQuantizer("a.b.C"),
                TransformerEncoderContainer(),
            ),
        ),
        (
            ["--override", "a:activations=float", "--override", "b:activation_observer=minmax"],
            Quantizer()
            .override("a", activations="float")
            .override("b", activation_observer=MinMax()),
        ),
        (
            ["--override", "a:scheme=float_cast,rounding=round_to_nearest"],
            Quantizer().override("a", scheme=FloatCast(), rounding=RoundToNearest()),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_say_what_the_builder_says(
    words: list[str], quantizer: Quantizer, monoquant: Monoquant
) -> None:
    done = monoquant("quantize", *words, "--dump-config")
    assert (done.code, done.err) == (0, "")
    assert done.json == quantizer.to_config()


OPTIONS = {
    "activations": "--activations",
    "asymmetric": "--asymmetric",
    "bits": "--bits",
    "fit": "--calibration",
    "float_zero_point": "--float-zero-point",
    "fold": "--fold",
    "granularity": "--granularity",
    "graph": "--graph",
    "group_size": "--group-size",
    "layer": "--layer",
    "observer": "--observer",
    "on_damage": "--on-damage",
    "only": "--only",
    "only_if_faster": "--only-if-faster",
    "outliers": "--outliers",
    "override": "--override",
    "quality": "--quality",
    "rounding": "--rounding",
    "scale_dtype": "--scale-dtype",
    "scheme": "--scheme",
    "skip": "--skip",
    "statistics": "--statistics",
    "measure_on": "--measure-on",
    "symmetric": "--symmetric",
    "transform": "--transform",
    "to_config": "--dump-config",
    "from_config": "--config",
    "apply_": "--in-place",
}
"""The option that says what a method of the builder says."""


def test_every_method_of_the_builder_has_an_option(monoquant: Monoquant) -> None:
    commands = {"plan", "apply"}
    methods = {name for name in dir(Quantizer) if not name.startswith("_")}
    assert methods - commands == set(OPTIONS)
    known = set(re.findall(r"--[a-z-]+", monoquant("quantize", "--help").out))
    assert set(OPTIONS.values()) <= known


def test_every_setting_of_an_override_can_be_said() -> None:
    said = set(inspect.signature(Quantizer().override).parameters) - {"selector"}
    assert said == set(_IN_OVERRIDE)


def test_a_dumped_configuration_can_be_begun_with(folder: Path, monoquant: Monoquant) -> None:
    dumped = monoquant("quantize", "--bits", 4, "--skip", "2", "--dump-config").out
    (folder / "four.json").write_text(dumped)
    done = monoquant(
        "quantize", "--config", "four.json", "--bits", 3, "--override", "0=8", "--dump-config"
    )
    assert done.json == Quantizer().bits(3).skip("2").override("0", bits=8).to_config()


SPOKEN = (
    *("--bits", "4", "--group-size", "32", "--observer", "mse:steps=9", "--rounding", "gptq"),
    *("--override", "2:bits=8,observer=minmax", "--activations", "static", "--no-fold"),
    *("--transform", "equalize_layers:sweeps=3", "--on-damage", "keep"),
)
DATA = ("--factory", SMALL, "--calibration", "batches.pt")


def test_what_was_dumped_makes_the_same_bytes(folder: Path, monoquant: Monoquant) -> None:
    (folder / "dumped.json").write_text(monoquant("quantize", *SPOKEN, "--dump-config").out)
    written = Quantizer.from_config(json.loads((folder / "dumped.json").read_text()))
    (folder / "builder.json").write_text(json.dumps(written.to_config()))
    for name, words in {
        "spoken": SPOKEN,
        "dumped": ("--config", "dumped.json"),
        "builder": ("--config", "builder.json"),
    }.items():
        done = monoquant("quantize", "model.pt", *words, *DATA, "-o", f"{name}.safetensors")
        assert done.code == 0, done.err
    spoken, *others = (
        (folder / f"{name}.safetensors").read_bytes() for name in ("spoken", "dumped", "builder")
    )
    assert others == [spoken, spoken]


TOML = """
skip = ["0"]
on_damage = "keep"

[settings]
bits = 4
observer = {kind = "mse", steps = 9, smallest = 0.5}
activation_observer = {kind = "mse", steps = 9, smallest = 0.5}

[[overrides]]
selector = "2"
bits = 8
"""


def test_a_configuration_may_be_toml(folder: Path, monoquant: Monoquant) -> None:
    (folder / "four.toml").write_text(TOML)
    done = monoquant("quantize", "--config", "four.toml", "--override", "4=6", "--dump-config")
    expected = (Quantizer().bits(4).observer(MSE(9, 0.5)).skip("0")).override("2", bits=8)
    expected = expected.on_damage("keep").override("4", bits=6)
    assert done.json == expected.to_config()


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.toml", "bits = = 4", "a.toml is not TOML: "),
        ("a.json", "bits = 4", "a.json is not JSON (a file in TOML is called .toml): "),
        ("a.toml", "bits = 4", "a quantizer has no bits"),
        ("a.json", "[" * 100_000, "a.json is not JSON"),
        ("a.toml", "bits = '\udcff'", "a.toml is not TOML: "),
        ("a.json", '{"settings": {"bits": 4, "bits": 3}}', "it says 'bits' twice"),
        ("a.toml", "settings.bits = 4\nsettings.bits = 3", "a.toml is not TOML: "),
        ("a.toml", "x = " + "[" * 5000, "a.toml is not TOML: "),
        ("a.toml", "[settings]\nbits = 0x" + "f" * 5000, "a number of more than 64 bits"),
        ("a.toml", "\n[a" + ".a" * 65 + "]", "a.toml has more than 64 dots in line 2: "),
        ("a.toml", '"\u2028"' + '."\u2028"' * 65 + "=1", "more than 64 dots in line 1: "),
        ("a.toml", "# much\n" * 20_000, "has 140000 characters, and TOML of up to 131072 is read"),
    ],
    ids=[
        "toml",
        "json",
        "unknown",
        "nested",
        "no text",
        "twice",
        "twice in toml",
        "nested toml",
        "number",
        "dots",
        "lines",
        "long",
    ],
)
def test_a_configuration_of_the_wrong_format_is_named(
    name: str, text: str, complaint: str, folder: Path, monoquant: Monoquant
) -> None:
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    done = monoquant("quantize", "--config", name, "--dump-config")
    assert done.code == 2
    assert complaint in done.complaint


def test_a_file_carries_the_configuration_that_made_it(folder: Path, monoquant: Monoquant) -> None:
    words = ("--bits", 4, "--override", "2=8", "--observer", "mse:steps=20")
    assert monoquant("quantize", "model.pt", *words, "-o", "s.safetensors").code == 0
    config = monoquant("info", "s.safetensors", "--json").json["config"]
    (folder / "made.json").write_text(json.dumps(config))
    assert (
        monoquant("quantize", "model.pt", "--config", "made.json", "-o", "t.safetensors").code == 0
    )
    assert same_tensors(load_model("s.safetensors", small()), load_model("t.safetensors", small()))


@pytest.mark.parametrize("name", ["type:Linear", "type:torch.nn:Linear"])
def test_layers_can_be_named_by_type(name: str, folder: Path, monoquant: Monoquant) -> None:
    skipped = monoquant("plan", "--factory", SMALL, "--skip", name)
    assert skipped.out.count("float: skipped") == 2
    overridden = monoquant("plan", "--factory", SMALL, "--override", f"{name}:bits=5")
    assert overridden.out.count("5-bit asymmetric") == 2
    shorter = monoquant("plan", "--factory", SMALL, "--override", f"{name}=5")
    assert shorter.out == overridden.out


def test_an_imported_module_brings_its_kinds(folder: Path, monoquant: Monoquant) -> None:
    done = monoquant(
        "plan", "model.pt", "--import", "tests.cli.networks",
        "--scheme", "renamed_for_the_command_line:bits=7",
    )  # fmt: skip
    assert "7-bit symmetric per-channel" in done.out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--bits", "9"], "bits is 2 to 8, or 16 for a cast, not 9"),
        (["--bits", "four"], "argument --bits: invalid int value: 'four'"),
        (["--symmetric", "--asymmetric"], "not allowed with argument --symmetric"),
        (["--granularity", "channel", "--group-size", "32"], "say one of the two"),
        (["--granularity", "rows"], "granularity is 'tensor', 'channel', 'group'"),
        (["--group-size", "0"], "a group has 1 value or more, not 0"),
        (["--scale-dtype", "float12"], "'float12' is not the name of a torch dtype"),
        (["--bits", "4", "--scheme", "affine"], "already fixes bits"),
        (["--scheme", "afine"], "there is no scheme 'afine'; there is affine, codebook"),
        (["--scheme", "minmax"], "'minmax' is a MinMax, which is no scheme"),
        (["--scheme", "nf4:group_size=many"], "group_size is a whole number, not 'many'"),
        (["--scheme", "nf4:bits=3"], "Codebook has no field bits"),
        (["--scheme", '{"kind": "afine", "a": {}}'], "no Scheme of kind 'afine': there is affine"),
        (["--scheme", "affine:bit=4"], "Affine has no field bit; it has bits"),
        (["--scheme", "{"], "is not JSON"),
        (["--scheme", "affine:4"], "'4' is not name=value"),
        (["--observer", "median"], "there is no observer 'median'; there is auto, entropy"),
        (["--observer", "affine"], "'affine' is a Affine, which is no observer"),
        (["--observer", "mse:steps=1"], "a search has 2 steps or more, not 1"),
        (
            ["--rounding", "up"],
            "no Rounding of kind 'up': there is gptq, hqq, importance,",
        ),
        (["--override", "head"], "write PATTERN=BITS or PATTERN:name=value"),
        (["--override", "head=eight"], "bits is a whole number, not 'eight'"),
        (["--override", "head:bitz=8"], "there is no bitz; there is bits"),
        (["--override", "head:symmetric=maybe"], "symmetric is true or false"),
        (["--override", "head:group_size=32,granularity=tensor"], "not both"),
        (["--skip", "type:Liner"], "'type:Liner' names no module class"),
        (["--dynamic", "--bits", "16"], "bits(16) is a cast: its activations cannot be"),
        (["--dynamic", "--activations", "static"], "not allowed with argument"),
        (["--activation-bits", "4"], "--activation-bits says how, and not when: add --activations"),
        (
            ["--transform", "nothing"],
            "there is no Transform or Correction of kind 'nothing': there is awq, ",
        ),
        (["--on-damage", "cry"], "invalid choice: 'cry'"),
        (["--import", "no_such_module"], "cannot import 'no_such_module'"),
        (["--fast"], "unrecognized arguments: --fast; see monoquant quantize --help"),
        (["--bit=4"], "no option --bit; is --bits meant?; see monoquant quantize --help"),
        (["--plan"], "no option --plan, which is a command: monoquant plan; see monoquant plan"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_are_refused_in_one_line(
    words: list[str], complaint: str, folder: Path, monoquant: Monoquant
) -> None:
    done = monoquant("quantize", "--dump-config", *words)
    assert done.code == 2
    assert done.complaint.startswith("monoquant: error: ")
    assert complaint in done.complaint


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds no JSON object"),
        ('{"bits": 4}', "a quantizer has no bits"),
        ('{"settings": {"bits": 16}}', "bits(16) is a cast: its activations cannot be"),
        ('{"on_damage": "cry"}', "on_damage is one of warn, keep, error"),
    ],
)
def test_configurations_that_cannot_be_are_refused(
    text: str, complaint: str, folder: Path, monoquant: Monoquant
) -> None:
    (folder / "config.json").write_text(text)
    done = monoquant("quantize", "--config", "config.json", "--dynamic", "--dump-config")
    assert done.code == 2
    assert complaint in done.complaint


def test_a_type_cannot_be_written_to_a_configuration(monoquant: Monoquant) -> None:
    done = monoquant("quantize", "--skip", "type:Linear", "--dump-config")
    assert done.code == 2
    assert nn.Linear.__qualname__ in done.complaint
    assert "cannot be written down" in done.complaint
