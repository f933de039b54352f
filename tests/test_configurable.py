"""Strategies as JSON and back; kinds in place of class paths."""

import json
from collections.abc import Iterable
from typing import ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

import mono_quant
from mono_quant import (
    AWQ,
    MSE,
    Affine,
    Codebook,
    Configurable,
    ConfigurationError,
    ConvQuantizer,
    Entropy,
    EqualizeLayers,
    FittedCodebook,
    Float8,
    FloatCast,
    Granularity,
    Histogram,
    LayerQuantizer,
    LinearLikeQuantizer,
    LinearQuantizer,
    Microscaling,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantizer,
    RangeEstimator,
    Rounding,
    RoundToNearest,
    Scheme,
    SmoothQuant,
    UnknownKindError,
)
from mono_quant.configurable import (
    Config,
    Json,
    Kinds,
    as_dtype,
    dtype_name,
    kinds_of,
    register,
    registered,
)
from mono_quant.numerics.granularity import Shape
from mono_quant.testing import Check
from mono_quant.testing.values import LAWS

VARIED: list[Configurable] = [
    Affine(4, False, PerGroup(32), torch.bfloat16),
    Affine(2, True, PerTensor(), torch.float32),
    FloatCast(torch.bfloat16),
    Float8(torch.float8_e5m2, PerGroup(16), torch.bfloat16),
    Codebook((-1.0, -0.5, 0.0, 1.0), PerTensor(), torch.float8_e4m3fn),
    FittedCodebook(3, PerChannel(), torch.float32),
    Microscaling("e3m2", "e4m3", PerGroup(16)),
    PerGroup(128),
    MSE(steps=10, smallest=0.25),
    EqualizeLayers(sweeps=3),
    AWQ(steps=3),
    SmoothQuant(alpha=0.25, steps=4),
    MovingAverage(momentum=0.5),
    Histogram(bins=100),
    Percentile(p=99.0),
    Entropy(bins=500),
    LinearQuantizer(own_forward=True),
    LinearLikeQuantizer("some.package.Layer"),
    LinearLikeQuantizer("some.package.Layer", transposed=True),
]
"""Strategies none of whose fields is left at its default, and those that have no defaults."""

BUILT_IN = {
    kind: cls for kind, cls in registered().items() if cls.__module__.startswith("mono_quant.")
}


def through_json(config: Config) -> dict[str, Json]:
    """Return a configuration as it comes out of a file."""
    back: dict[str, Json] = json.loads(json.dumps(config, allow_nan=False))
    return back


def examples() -> list[Configurable]:
    """Return every registered strategy, as it is made by default where it can be, and varied."""
    known = {type(one) for one in VARIED}
    found = list(VARIED)
    for kind, cls in BUILT_IN.items():
        try:
            found.append(cls.from_config({"kind": kind}))
        except ConfigurationError:
            assert cls in known, f"{cls.__name__} has no default: add one to VARIED"
    return found


def bases(strategy: Configurable) -> list[type[Configurable]]:
    """Return the strategy's class and every class above it that configurations are read by."""
    return [cls for cls in type(strategy).__mro__ if issubclass(cls, Configurable)]


@pytest.mark.parametrize("strategy", examples(), ids=repr)
def test_every_strategy_comes_back_from_json(strategy: Configurable) -> None:
    config = through_json(strategy.to_config())
    for base in bases(strategy):
        assert base.from_config(config) == strategy
    assert config["kind"] == strategy.kind


@pytest.mark.parametrize(
    "check", [one for strategy in examples() for one in LAWS.about(strategy)], ids=str
)
def test_every_strategy_is_a_value_that_can_be_written_down(check: Check) -> None:
    check()


def test_what_is_varied_differs_from_the_default() -> None:
    for strategy in VARIED:
        assert strategy not in [cls.from_config({"kind": k}) for k, cls in without_arguments()]


def without_arguments() -> list[tuple[str, type[Configurable]]]:
    return [(kind, cls) for kind, cls in BUILT_IN.items() if kind != "linear_like"]


def test_kinds_are_unlike_and_no_paths() -> None:
    assert len({cls.kind for cls in BUILT_IN.values()}) == len(BUILT_IN)
    assert all(kind == cls.kind and kind.isidentifier() for kind, cls in BUILT_IN.items())


@pytest.mark.parametrize("kind", ["no_such_kind", "", None, 3, "mono_quant.schemes.affine.Affine"])
def test_an_unknown_kind_is_refused_with_the_cure(kind: Json) -> None:
    with pytest.raises(UnknownKindError) as raised:
        Scheme.from_config({"kind": kind})
    assert isinstance(raised.value, KeyError)
    message = str(raised.value)
    assert message.startswith(f"no class of kind {kind!r} is known")
    assert "@mono_quant.register" in message
    assert "kinds={" in message


def test_a_configuration_without_a_kind_is_refused() -> None:
    with pytest.raises(UnknownKindError, match="no class of kind None"):
        Scheme.from_config({"bits": 8})


def test_an_unknown_field_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigurationError) as raised:
        Scheme.from_config({"kind": "affine", "bits": 8, "group": 64, "axis": 0})
    assert str(raised.value) == (
        "Affine has no field axis, group; it has bits, float_zero_point, granularity, "
        "scale_dtype, symmetric"
    )
    with pytest.raises(ConfigurationError, match="MinMax has no field bins; it has none"):
        RangeEstimator.from_config({"kind": "minmax", "bins": 10})


def test_a_missing_field_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"LinearLikeQuantizer cannot be made.*class_name"):
        LayerQuantizer.from_config({"kind": "linear_like"})


@pytest.mark.parametrize(
    ("base", "strategy", "message"),
    [
        (Scheme, MinMax(), "expected a Scheme, but kind 'minmax' is a MinMax"),
        (Rounding, Affine(), "expected a Rounding, but kind 'affine' is a Affine"),
        (Observer, Affine(), "expected a Observer, but kind 'affine' is a Affine"),
        (ConvQuantizer, LinearQuantizer(), "expected a ConvQuantizer, but kind 'linear'"),
        (Granularity, RoundToNearest(), "expected a Granularity"),
    ],
    ids=str,
)
def test_a_strategy_of_another_base_is_refused(
    base: type[Configurable], strategy: Configurable, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        base.from_config(strategy.to_config())


def as_texts(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


def as_sizes(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(values)


def as_dtypes(values: Iterable[torch.dtype | str]) -> tuple[torch.dtype, ...]:
    return tuple(map(as_dtype, values))


@attrs.frozen
class Halves(RangeEstimator):
    """A third party's observer: half of the largest magnitude."""

    kind: ClassVar[str] = "tests.halves"
    share: float = 0.5
    labels: tuple[str, ...] = attrs.field(default=("a", "b"), converter=as_texts)

    def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
        low, high = MinMax().range_of(x, scheme, block_size)
        return low * self.share, high * self.share


@attrs.frozen
class Rows(Granularity):
    """A third party's granularity: some rows together."""

    kind: ClassVar[str] = "tests.rows"
    rows: int = 2

    def block_size(self, shape: Shape) -> Shape:
        return (1, self.rows, shape[-1])


THEIRS: Kinds = {"tests.halves": Halves, "tests.rows": Rows}


def test_a_third_partys_strategy_is_known_through_kinds() -> None:
    strategy = Halves(share=0.75, labels=("x",))
    config = through_json(strategy.to_config())
    assert config == {"kind": "tests.halves", "share": 0.75, "labels": ["x"]}
    assert RangeEstimator.from_config(config, THEIRS) == strategy
    with pytest.raises(UnknownKindError):
        RangeEstimator.from_config(config)


def test_a_third_partys_strategy_is_known_inside_a_built_in_one() -> None:
    scheme = Affine(4, granularity=Rows(3))
    assert Scheme.from_config(through_json(scheme.to_config()), THEIRS) == scheme


def test_a_third_partys_strategy_is_known_inside_a_quantizer() -> None:
    quantizer = Quantizer().bits(4).granularity(Rows(4)).observer(Halves(0.25))
    back = Quantizer.from_config(through_json(quantizer.to_config()), THEIRS)
    assert repr(back) == repr(quantizer)
    weight = nn.Sequential(nn.Linear(64, 64))
    assert "4-bit asymmetric tests.rows" in back.plan(weight).explain()


def test_kinds_go_before_what_is_registered() -> None:
    @attrs.frozen
    class Other(RangeEstimator):
        kind: ClassVar[str] = "minmax"

        def range_of(self, x: Tensor, scheme: Scheme, block_size: Shape) -> tuple[Tensor, Tensor]:
            return MinMax().range_of(x, scheme, block_size)

    found = RangeEstimator.from_config({"kind": "minmax"}, {"minmax": Other})
    assert isinstance(found, Other)
    assert RangeEstimator.from_config({"kind": "minmax"}) == MinMax()


def test_a_registered_strategy_needs_no_kinds() -> None:
    @register
    @attrs.frozen
    class Registered(Halves):
        kind: ClassVar[str] = "tests.registered"

    assert RangeEstimator.from_config({"kind": "tests.registered"}) == Registered()
    assert registered()["tests.registered"] is Registered


def test_a_kind_belongs_to_one_class() -> None:
    @attrs.frozen
    class Impostor(Granularity):
        kind: ClassVar[str] = "affine"

        def block_size(self, shape: Shape) -> Shape:
            return shape

    with pytest.raises(ConfigurationError, match="kind 'affine' already belongs to Affine"):
        register(Impostor)
    assert registered()["affine"] is Affine


def test_a_class_of_the_same_name_from_elsewhere_does_not_take_a_kind_over() -> None:
    theirs = type("PerChannel", (PerTensor,), {"kind": "per_channel", "__slots__": ()})
    with pytest.raises(ConfigurationError, match="kind 'per_channel' already belongs to"):
        register(theirs)
    assert registered()["per_channel"] is PerChannel


def test_the_kinds_of_a_strategy_are_its_own_and_those_it_holds() -> None:
    scheme = Affine(4, granularity=Rows(3))
    assert kinds_of(scheme, MinMax()) == {"affine": Affine, "tests.rows": Rows, "minmax": MinMax}
    assert kinds_of() == {}
    assert Scheme.from_config(scheme.to_config(), kinds_of(scheme)) == scheme


def test_registering_a_class_again_is_no_clash() -> None:
    assert register(Affine) is Affine


@attrs.frozen
class Fields(Configurable):
    """A field of every sort."""

    kind: ClassVar[str] = "tests.fields"
    text: str
    number: int
    share: float
    flag: bool
    nothing: None
    dtype: torch.dtype = attrs.field(converter=as_dtype)
    sizes: tuple[int, ...] = attrs.field(converter=as_sizes)
    dtypes: tuple[torch.dtype, ...] = attrs.field(converter=as_dtypes)
    inner: Scheme
    _private: int = attrs.field(default=1, alias="private")


def test_fields_of_every_sort_are_written_and_read() -> None:
    strategy = Fields(
        "a", 3, 0.5, True, None, torch.int8, (1, 2), (torch.int8, torch.float16), Affine(4), 7
    )
    config = through_json(strategy.to_config())
    assert config["private"] == 7
    assert config["dtypes"] == ["int8", "float16"]
    assert Configurable.from_config(config, {"tests.fields": Fields}) == strategy


@attrs.frozen
class Unwritable(Configurable):
    kind: ClassVar[str] = "tests.unwritable"
    value: object


@pytest.mark.parametrize(
    "value",
    [object(), torch.zeros(1), {1, 2}, len, b"bytes", 1j],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_json_is_refused(value: object) -> None:
    with pytest.raises(ConfigurationError, match="cannot be written to a configuration"):
        Unwritable(value).to_config()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
def test_a_dtype_is_written_by_its_name(dtype: torch.dtype) -> None:
    assert as_dtype(dtype_name(dtype)) == as_dtype(dtype) == dtype


@pytest.mark.parametrize("name", ["nn", "Tensor", "float17", "torch.float16", ""])
def test_what_is_no_dtype_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="is not the name of a torch dtype"):
        as_dtype(name)


def test_the_decorator_is_public() -> None:
    assert mono_quant.register is register
