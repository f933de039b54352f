"""Quantizers as text: a repr that pastes back, a configuration that comes back."""

import json

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mono_quant
from mono_quant import (
    MSE,
    Affine,
    ConfigurationError,
    Container,
    ConvQuantizer,
    FloatCast,
    LinearLikeQuantizer,
    LinearQuantizer,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantizer,
    RangeEstimator,
    RoundToNearest,
    UnknownKindError,
)
from mono_quant.configurable import Config, Json
from mono_quant.selection import Selector
from tests.helpers import Doubled, TiedModel, Whole, fates, noise, three_layers


@attrs.frozen
class Nothing(Container):
    """A container that is none."""

    kind = "tests.nothing"

    def matches(self, module: nn.Module) -> bool:
        return False


NAMESPACE: dict[str, object] = {**vars(mono_quant), "torch": torch, "Doubled": Doubled}
OBSERVERS: list[RangeEstimator] = [MinMax(), MSE(steps=9)]
PATTERNS = st.lists(st.sampled_from(["0", "2", "*", "3", "?"]), max_size=2)


@st.composite
def quantizers(draw: st.DrawFn) -> Quantizer:
    """Draw a quantizer that can be written down, by a chain of calls that do not conflict."""
    made = Quantizer()
    form = draw(st.sampled_from(["default", "parts", "scheme", "cast"]))
    if form == "scheme":
        made = made.scheme(draw(st.sampled_from([Affine(3, False, PerGroup(16)), FloatCast()])))
    if form == "cast":
        made = made.bits(16)
    if form == "parts":
        made = made.bits(draw(st.integers(2, 8))).symmetric(draw(st.booleans()))
        made = made.granularity(draw(st.sampled_from([PerTensor(), PerChannel(), PerGroup(32)])))
        made = made.scale_dtype(draw(st.sampled_from([torch.float16, torch.float32])))
    if draw(st.booleans()):
        made = made.observer(draw(st.sampled_from(OBSERVERS)))
    if draw(st.booleans()):
        made = made.observer(activations=MinMax())
    modes = [None] if form == "cast" else [None, "dynamic", "static"]
    if draw(st.booleans()):
        mode = draw(st.sampled_from(modes))
        if mode is None:
            made = made.activations(None)
        else:
            width, symmetric = draw(st.integers(2, 8)), draw(st.booleans())
            made = made.activations(mode, bits=width, symmetric=symmetric)
    if draw(st.booleans()):
        made = made.rounding(RoundToNearest())
    made = made.only(*draw(PATTERNS)).skip(*draw(PATTERNS))
    for pattern in draw(PATTERNS):
        made = made.override(pattern, bits=draw(st.integers(2, 8)), observer=MSE(smallest=0.5))
        made = made.override(pattern, activations=draw(st.sampled_from(["float", "dynamic"])))
    if draw(st.booleans()):
        made = made.layer(LinearLikeQuantizer("a.b", transposed=True), ConvQuantizer())
    if draw(st.booleans()):
        made = made.transform(Doubled())
    return made


@given(quantizers())
def test_a_repr_is_the_chain_that_makes_the_same_quantizer(quantizer: Quantizer) -> None:
    back: object = eval(repr(quantizer), dict(NAMESPACE))
    assert isinstance(back, Quantizer)
    assert repr(back) == repr(quantizer)
    assert back.to_config() == quantizer.to_config()


@given(quantizers())
def test_a_quantizer_comes_back_from_json(quantizer: Quantizer) -> None:
    config: dict[str, Json] = json.loads(json.dumps(quantizer.to_config(), allow_nan=False))
    back = Quantizer.from_config(config, {"tests.doubled": Doubled})
    assert repr(back) == repr(quantizer)
    assert back.to_config() == quantizer.to_config()


def test_a_type_is_shown_by_its_full_name_and_pastes_back() -> None:
    made = Quantizer().skip(nn.Linear).override(nn.Conv2d, bits=4)
    assert repr(made) == (
        "Quantizer().skip(torch.nn.modules.linear.Linear)"
        ".override(torch.nn.modules.conv.Conv2d, bits=4)"
    )
    assert repr(eval(repr(made), dict(NAMESPACE))) == repr(made)


def test_what_cannot_be_pasted_is_shown_as_such() -> None:
    def large(name: str, module: nn.Module) -> bool:
        return True

    made = Quantizer().only(large).skip(nn.Linear(2, 2)).fit([noise(2, 128)])
    assert repr(made) == "Quantizer().only(<large>).skip(<Linear>).fit(<list>)"


@pytest.mark.parametrize("selector", [nn.Linear, nn.Linear(2, 2), lambda name, module: True])
def test_what_is_no_name_refuses_to_be_written_down(selector: Selector) -> None:
    for made in (
        Quantizer().only(selector),
        Quantizer().skip(selector),
        Quantizer().override(selector, bits=4),
    ):
        with pytest.raises(ConfigurationError, match="cannot be written down; name the layers"):
            made.to_config()


def test_a_plan_resolves_functions_types_and_modules_to_names() -> None:
    of = three_layers()
    made = (
        Quantizer()
        .bits(4)
        .only(lambda name, module: name in {"0", "2"}, "0")
        .skip(of[3])
        .override(nn.Linear, bits=8)
    )
    plan = made.plan(of)
    config: dict[str, Json] = json.loads(json.dumps(plan.outline.config))
    assert config["only"] == ["0", "2", "0"]
    assert config["skip"] == ["3"]
    assert config["overrides"] == [{"selector": name, "bits": 8} for name in ("0", "2", "3")]
    again = Quantizer.from_config(config)
    assert again.plan(of).explain() == plan.explain()


def test_a_configuration_keeps_patterns_as_they_were_said() -> None:
    config = Quantizer().skip("0*").plan(three_layers()).outline.config
    assert config["skip"] == ["0*"]


def test_data_is_no_part_of_a_configuration() -> None:
    assert Quantizer().fit(noise(2, 128)).to_config() == Quantizer().to_config()


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"bits": 4}, ConfigurationError, "a quantizer has no bits"),
        ({"settings": {"width": 4}}, ConfigurationError, "there is no setting width"),
        ({"settings": 4}, ConfigurationError, "expected a mapping, not 4"),
        ({"skip": "head"}, ConfigurationError, "expected a list, not 'head'"),
        ({"only": {"a": 1}}, ConfigurationError, "expected a list"),
        ({"overrides": [{"bits": 4}]}, ConfigurationError, "an override's selector is a name"),
        ({"overrides": [{"selector": 1, "bits": 4}]}, ConfigurationError, "not 1"),
        ({"overrides": ["head"]}, ConfigurationError, "expected a mapping, not 'head'"),
        ({"layers": [{"kind": "nothing"}]}, UnknownKindError, "no class of kind 'nothing'"),
        ({"layers": [{"kind": "affine"}]}, ConfigurationError, "expected a LayerQuantizer"),
        ({"transforms": [{"kind": "minmax"}]}, ConfigurationError, "expected a Transform"),
        ({"activation_observer": {}}, ConfigurationError, "a quantizer has no activation_observer"),
        (
            {"settings": {"activation_observer": {"kind": "affine"}}},
            ConfigurationError,
            "expected a RangeEstimator",
        ),
        (
            {"settings": {"activation_observer": {"kind": "tests.whole"}}},
            ConfigurationError,
            "sees a tensor whole, and activations come in pieces: give an Observer",
        ),
        (
            {"settings": {"activations": {"kind": "minmax"}}},
            ConfigurationError,
            "expected an? Activations",
        ),
        (
            {"settings": {"activations": {"kind": "activations", "mode": "later"}}},
            ConfigurationError,
            "'dynamic', 'static' or None",
        ),
    ],
    ids=str,
)
def test_an_unknown_word_in_a_configuration_is_refused(
    config: Config, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Quantizer.from_config(config)


def test_an_empty_configuration_is_the_default() -> None:
    assert repr(Quantizer.from_config({})) == "Quantizer()"


def test_containers_are_written_down_beside_layers() -> None:
    made = Quantizer().layer(Nothing(), LinearQuantizer())
    config = made.to_config()
    assert config["layers"] == [{"kind": "linear", "own_forward": False}]
    assert config["containers"] == [{"kind": "tests.nothing"}]
    back = Quantizer.from_config(config, {"tests.nothing": Nothing})
    assert repr(back) == repr(made)


def test_observers_of_weights_and_of_activations_are_kept_apart() -> None:
    made = Quantizer().observer(weights=MSE(), activations=MinMax())
    assert repr(made) == (
        "Quantizer().observer(weights=MSE(steps=80, smallest=0.4)).observer(activations=MinMax())"
    )
    assert repr(Quantizer().observer(Whole())) == "Quantizer().observer(weights=Whole())"
    assert repr(Quantizer().observer(MinMax())) == (
        "Quantizer().observer(weights=MinMax()).observer(activations=MinMax())"
    )


def test_the_tied_model_has_one_weight_under_two_names() -> None:
    of = TiedModel()
    assert fates(Quantizer(), of)["embedding.weight"] == (
        "8-bit symmetric per-channel; float inputs: its inputs are indices; "
        "dynamic 8-bit asymmetric per-token inputs of head.weight; also head.weight"
    )
