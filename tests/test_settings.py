"""What was asked for: contradictions, precedence, defaults, and the way to JSON and back."""

import json

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mono_quant import (
    MSE,
    Affine,
    ConfigurationError,
    FloatCast,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    RoundToNearest,
)
from mono_quant.configurable import Config, Json
from mono_quant.numerics.granularity import Shape
from mono_quant.settings import Settings

SYMMETRY = ("symmetric", "float_zero_point")
"""Settings of which one may undo the other."""

PARTS = st.builds(
    lambda symmetry, **parts: Settings(**dict(zip(SYMMETRY, symmetry, strict=True)), **parts),
    bits=st.sampled_from([None, 2, 3, 4, 5, 6, 7, 8]),
    symmetry=st.sampled_from(
        [(said, floats) for said in (None, True, False) for floats in (None, True, False)]
    ).filter(lambda pair: pair != (True, True)),
    granularity=st.sampled_from([None, PerTensor(), PerChannel(), PerGroup(32)]),
    scale_dtype=st.sampled_from([None, torch.float16, torch.float32]),
    observer=st.sampled_from([None, MinMax(), MSE(steps=10)]),
    rounding=st.sampled_from([None, RoundToNearest()]),
)
WHOLE = st.builds(
    Settings,
    scheme=st.sampled_from([Affine(4), Affine(3, False, PerGroup(16)), FloatCast()]),
    observer=st.sampled_from([None, MinMax(), MSE(steps=10)]),
)
CASTS = st.builds(Settings, bits=st.just(16), observer=st.sampled_from([None, MinMax()]))
GRIDS = st.one_of(PARTS, WHOLE)
ANY = st.one_of(PARTS, WHOLE, CASTS)
STACK = (1, 8, 128)


@given(ANY)
def test_settings_come_back_from_json(settings: Settings) -> None:
    config: dict[str, Json] = json.loads(json.dumps(settings.to_config()))
    assert Settings.from_config(config) == settings


@given(ANY)
def test_only_what_was_said_is_written_down(settings: Settings) -> None:
    said = {name for name, value in attrs.asdict(settings, recurse=False).items() if value}
    assert said - set(settings.to_config()) == set()
    assert Settings().to_config() == {}


@given(ANY)
def test_saying_nothing_changes_nothing(settings: Settings) -> None:
    assert settings.over(Settings()) == settings
    assert Settings().over(settings) == settings
    assert settings.over(settings) == settings


@given(ANY, GRIDS)
def test_what_is_said_last_wins_and_the_rest_stays(last: Settings, first: Settings) -> None:
    both = last.over(first)
    for name, value in attrs.asdict(last, recurse=False).items():
        if value is not None:
            assert getattr(both, name) == value
    for name in ("observer", "rounding"):
        if getattr(last, name) is None:
            assert getattr(both, name) == getattr(first, name)


@given(PARTS, PARTS)
def test_parts_are_laid_over_parts_one_by_one(last: Settings, first: Settings) -> None:
    both = attrs.asdict(last.over(first), recurse=False)
    lower = attrs.asdict(first, recurse=False)
    for name, value in attrs.asdict(last, recurse=False).items():
        if name not in SYMMETRY:
            assert both[name] == (value if value is not None else lower[name])


def test_symmetry_and_float_zero_points_replace_each_other() -> None:
    floats, symmetric = Settings(float_zero_point=True), Settings(symmetric=True)
    assert symmetric.over(floats) == symmetric
    assert floats.over(symmetric) == floats
    both = Settings(symmetric=False, float_zero_point=True)
    assert Settings(symmetric=False).over(floats) == both
    assert floats.over(Settings(symmetric=False)) == both
    assert Settings(float_zero_point=False).over(symmetric).symmetric is True


@pytest.mark.parametrize("bits", [4, 8])
def test_float_zero_points_make_a_grid_asymmetric_at_every_width(bits: int) -> None:
    scheme = Settings(bits=bits, float_zero_point=True).recipe(STACK).grid.scheme
    assert isinstance(scheme, Affine)
    assert (scheme.symmetric, scheme.float_zero_point) == (False, True)


@given(st.one_of(WHOLE, CASTS), PARTS)
def test_a_scheme_or_a_cast_replaces_the_parts(last: Settings, first: Settings) -> None:
    both = last.over(first)
    assert both.recipe(STACK).grid.scheme == last.recipe(STACK).grid.scheme
    assert (both.symmetric, both.granularity, both.scale_dtype) == (None, None, None)


@given(PARTS, WHOLE)
def test_a_part_replaces_a_scheme(last: Settings, first: Settings) -> None:
    both = last.over(first)
    parts = (last.bits, last.symmetric, last.granularity, last.scale_dtype)
    if any(part is not None for part in parts):
        assert both.scheme is None
        assert both.recipe(STACK).grid.scheme == last.recipe(STACK).grid.scheme
    else:
        assert both.scheme == first.scheme


def test_a_width_replaces_a_cast() -> None:
    assert Settings(bits=4).over(Settings(bits=16)) == Settings(bits=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 8, "scheme": Affine().to_config()}, "already fixes bits; say it in the scheme"),
        ({"symmetric": False, "scheme": Affine().to_config()}, "already fixes symmetric"),
        (
            {
                "granularity": PerTensor().to_config(),
                "scale_dtype": "float32",
                "scheme": FloatCast().to_config(),
            },
            "already fixes granularity and scale_dtype",
        ),
        ({"bits": 16, "symmetric": True}, "a cast: it has no symmetric"),
        (
            {"bits": 16, "granularity": PerTensor().to_config(), "scale_dtype": "float32"},
            "a cast: it has no granularity and no scale_dtype",
        ),
        ({"bits": 1}, "bits is 2 to 8, or 16 for a cast, not 1"),
        ({"bits": 9}, "not 9"),
        ({"bits": 0}, "not 0"),
        ({"bits": -8}, "not -8"),
        ({"bits": 32}, "not 32"),
        ({"bits": True}, "not True"),
        ({"bits": 4.0}, "bits is a number"),
        ({"bits": "4"}, "bits is a number"),
        ({"symmetric": 1}, "symmetric and float_zero_point are booleans"),
        ({"symmetric": "yes"}, "symmetric and float_zero_point are booleans"),
        ({"float_zero_point": 1}, "symmetric and float_zero_point are booleans"),
        ({"symmetric": True, "float_zero_point": True}, "no zero point that could be a float"),
        ({"bits": 16, "float_zero_point": True}, "a cast: it has no float_zero_point"),
        ({"width": 4, "axis": 0}, "there is no setting axis, width"),
        ({"scale_dtype": "float17"}, "not the name of a torch dtype"),
        ({"granularity": "channel"}, "granularity is a mapping with a kind, not 'channel'"),
        ({"observer": "minmax"}, "observer is a mapping with a kind"),
        ({"rounding": ["round_to_nearest"]}, "rounding is a mapping with a kind"),
        ({"scheme": {"kind": "minmax"}}, "expected a Scheme"),
        ({"observer": {"kind": "affine"}}, "expected a RangeEstimator"),
    ],
    ids=str,
)
def test_contradictions_and_what_is_unknown_are_refused(config: Config, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Settings.from_config(config)


@pytest.mark.parametrize(
    ("settings", "stack", "words"),
    [
        (Settings(), STACK, "8-bit symmetric per-channel"),
        (Settings(bits=8), (1, 8, 100), "8-bit symmetric per-channel"),
        (Settings(bits=7), STACK, "7-bit asymmetric per-group 64"),
        (Settings(bits=4), STACK, "4-bit asymmetric per-group 64"),
        (Settings(bits=4), (1, 8, 96), "4-bit asymmetric per-channel"),
        (Settings(bits=4), (1, 8, 9), "4-bit asymmetric per-channel"),
        (Settings(bits=2, symmetric=True), STACK, "2-bit symmetric per-group 64"),
        (Settings(symmetric=False), STACK, "8-bit asymmetric per-channel"),
        (Settings(granularity=PerGroup(32)), STACK, "8-bit symmetric per-group 32"),
        (Settings(bits=4, granularity=PerChannel()), STACK, "4-bit asymmetric per-channel"),
        (Settings(bits=4, granularity=PerGroup(60)), STACK, "4-bit asymmetric per-group 60"),
        (Settings(bits=16), STACK, "float16"),
        (Settings(scheme=FloatCast(torch.bfloat16)), STACK, "bfloat16"),
        (Settings(scheme=Affine(3)), STACK, "3-bit symmetric per-channel"),
    ],
)
def test_a_recipe_fills_in_what_was_not_said(settings: Settings, stack: Shape, words: str) -> None:
    assert settings.recipe(stack).grid.scheme.describe() == words


def test_a_group_size_that_was_asked_for_is_never_changed() -> None:
    scheme = Settings(bits=4, granularity=PerGroup(60)).recipe(STACK).grid.scheme
    assert scheme.granularity == PerGroup(60)
    assert scheme.refuse(STACK) == "a group of 60 does not divide a row of 128"


def test_the_usual_recipe_is_min_max_rounded_to_nearest_with_half_precision_scales() -> None:
    recipe = Settings().recipe(STACK)
    assert recipe.grid.scheme == Affine(8, True, PerChannel(), torch.float16)
    assert recipe.grid.observer == MinMax()
    assert recipe.rounding == RoundToNearest()


def test_a_recipe_takes_over_what_was_said() -> None:
    recipe = Settings(scale_dtype=torch.float32, observer=MSE(), bits=5).recipe(STACK)
    assert recipe.grid.observer == MSE()
    assert recipe.grid.scheme == Affine(5, False, PerGroup(64), torch.float32)


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        (Settings(), 8),
        (Settings(bits=3), 3),
        (Settings(bits=16), 16),
        (Settings(scheme=Affine(5)), 5),
        (Settings(scheme=FloatCast()), 16),
    ],
)
def test_a_width_is_that_of_the_codes(settings: Settings, width: int) -> None:
    assert settings.width == width
