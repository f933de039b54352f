"""The builder: every call gives a new quantizer, and what it was told can be read and kept."""

import json
from collections.abc import Callable

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mono_quant
from mono_quant import (
    MSE,
    Affine,
    ConfigurationError,
    Container,
    ConvQuantizer,
    FloatCast,
    InputError,
    LinearLikeQuantizer,
    LinearQuantizer,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantizedModule,
    Quantizer,
    RoundToNearest,
    Transform,
    UnknownKindError,
)
from mono_quant.configurable import Config, Json
from mono_quant.selection import Selector
from tests.helpers import Doubled, TiedModel, fates, layer_rows, noise

Call = Callable[[Quantizer], Quantizer]


@attrs.frozen
class Nothing(Container):
    """A container that is none."""

    kind = "tests.nothing"

    def matches(self, module: nn.Module) -> bool:
        return False


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 4))


CALLS: dict[str, Call] = {
    "bits": lambda q: q.bits(4),
    "symmetric": lambda q: q.symmetric(),
    "asymmetric": lambda q: q.asymmetric(),
    "granularity": lambda q: q.granularity("tensor"),
    "group_size": lambda q: q.group_size(32),
    "scale_dtype": lambda q: q.scale_dtype(torch.float32),
    "scheme": lambda q: q.scheme(Affine(3)),
    "observer": lambda q: q.observer(MSE()),
    "rounding": lambda q: q.rounding(RoundToNearest()),
    "only": lambda q: q.only("0"),
    "skip": lambda q: q.skip("0"),
    "override": lambda q: q.override("0", bits=8),
    "layer": lambda q: q.layer(LinearLikeQuantizer("a.b")),
    "transform": lambda q: q.transform(Doubled()),
    "fit": lambda q: q.fit(torch.zeros(2, 128)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_returns_a_new_quantizer_and_leaves_the_old_one_alone(name: str) -> None:
    base = Quantizer()
    before = repr(base)
    made = CALLS[name](base)
    assert made is not base
    assert repr(base) == before == "Quantizer()"
    assert repr(made) != before


def test_every_method_that_sets_something_is_tried_here() -> None:
    others = {"plan", "apply", "apply_", "to_config", "from_config"}
    public = {name for name in dir(Quantizer) if not name.startswith("_")}
    assert public - others == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_the_docstring_says_whether_a_call_replaces_or_adds(name: str) -> None:
    text = getattr(Quantizer, name).__doc__ or ""
    assert ("**Adds**" in text) != ("**Replaces**" in text)
    adds = {"only", "skip", "override", "layer", "transform"}
    assert ("**Adds**" in text) == (name in adds)


def test_a_quantizer_cannot_be_changed() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(Quantizer(), "_request", None)  # noqa: B010  # mypy knows that it is frozen


def test_forks_do_not_know_of_each_other() -> None:
    base = Quantizer().bits(4).skip("0")
    one, other = base.skip("2").group_size(32), base.override("3", bits=8)
    assert repr(base) == "Quantizer().bits(4).skip('0')"
    assert repr(one) == "Quantizer().bits(4).granularity(PerGroup(size=32)).skip('0', '2')"
    assert repr(other) == "Quantizer().bits(4).skip('0').override('3', bits=8)"


def test_a_subclass_stays_itself() -> None:
    class House(Quantizer):
        """A house style."""

    made = House().bits(4).skip("0").fit(torch.zeros(1, 128))
    assert type(made) is House
    assert type(House.from_config(House().bits(4).to_config())) is House


REPLACEMENTS: list[tuple[Call, str]] = [
    (lambda q: q.bits(4).bits(3), "3-bit asymmetric per-group 64"),
    (lambda q: q.symmetric().asymmetric(), "8-bit asymmetric per-channel"),
    (lambda q: q.asymmetric().symmetric(), "8-bit symmetric per-channel"),
    (lambda q: q.symmetric(False), "8-bit asymmetric per-channel"),
    (lambda q: q.granularity("tensor").granularity("channel"), "8-bit symmetric per-channel"),
    (lambda q: q.granularity("group"), "8-bit symmetric per-group 64"),
    (lambda q: q.granularity(PerGroup(16)), "8-bit symmetric per-group 16"),
    (lambda q: q.group_size(32).group_size(16), "8-bit symmetric per-group 16"),
    (lambda q: q.granularity("group").group_size(32), "8-bit symmetric per-group 32"),
    (lambda q: q.group_size(32).granularity("tensor"), "8-bit symmetric per-tensor"),
    (lambda q: q.scheme(Affine(3)).scheme(FloatCast()), "float16"),
    (lambda q: q.bits(16), "float16"),
    (lambda q: q.bits(16).bits(5), "5-bit asymmetric per-group 64"),
]


@pytest.mark.parametrize("place", range(len(REPLACEMENTS)))
def test_a_call_that_replaces_lets_the_last_word_win(place: int) -> None:
    calls, words = REPLACEMENTS[place]
    assert fates(calls(Quantizer()), model())["0.weight"] == words


def test_the_last_scale_dtype_observer_rounding_and_data_win() -> None:
    made = (
        Quantizer()
        .scale_dtype(torch.bfloat16)
        .scale_dtype(torch.float32)
        .observer(MSE())
        .observer(MinMax())
        .fit([torch.zeros(2, 128)])
        .fit(torch.zeros(3, 128))
    )
    assert repr(made).startswith("Quantizer().scale_dtype(torch.float32).observer(MinMax())")
    assert made.apply(model(), progress=False).report.samples == 3


def test_skip_adds_to_earlier_patterns() -> None:
    found = fates(Quantizer().skip("0").skip("2", "3"), model())
    assert list(found.values()) == ["float: skipped"] * 3


def test_only_adds_to_earlier_patterns() -> None:
    found = fates(Quantizer().only("0").only("3"), model())
    assert found["2.weight"] == "float: not among only(...)"
    assert found["0.weight"] == found["3.weight"] == "8-bit symmetric per-channel"


def test_skip_goes_before_only() -> None:
    found = fates(Quantizer().only("0", "2").skip("2"), model())
    assert found["2.weight"] == "float: skipped"


def test_overrides_add_and_the_last_one_wins() -> None:
    made = (
        Quantizer()
        .bits(4)
        .override("*", symmetric=True)
        .override(nn.Linear, group_size=32)
        .override("2", group_size=16, bits=3)
        .override("2", bits=6)
    )
    assert fates(made, model()) == {
        "0.weight": "4-bit symmetric per-group 32",
        "2.weight": "6-bit symmetric per-group 16",
        "3.weight": "4-bit symmetric per-group 32",
    }


def test_an_override_changes_only_what_it_says() -> None:
    made = Quantizer().bits(4).group_size(32).override("0", bits=8)
    assert fates(made, model())["0.weight"] == "8-bit symmetric per-group 32"
    made = Quantizer().bits(4).asymmetric().override("0", granularity="tensor")
    assert fates(made, model())["0.weight"] == "4-bit asymmetric per-tensor"


def test_an_override_by_a_scheme_replaces_all_of_the_grid() -> None:
    made = Quantizer().bits(4).group_size(32).override("0", scheme=FloatCast())
    assert fates(made, model())["0.weight"] == "float16"


def test_an_override_of_a_part_replaces_the_scheme_for_all() -> None:
    made = Quantizer().scheme(Affine(3)).override("0", bits=5)
    assert fates(made, model())["0.weight"] == "5-bit asymmetric per-group 64"
    assert fates(made, model())["2.weight"] == "3-bit symmetric per-channel"


def test_layers_add_and_go_before_the_built_in_ones() -> None:
    class Own(nn.Linear):
        """A linear layer with a forward of its own."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    of = nn.Sequential(Own(64, 64))
    refused = fates(Quantizer().layer(ConvQuantizer()), of)["0.weight"]
    assert refused.startswith("float: Own is a Linear with a forward of its own")
    made = Quantizer().layer(ConvQuantizer()).layer(LinearQuantizer(own_forward=True))
    assert fates(made, of)["0.weight"] == "8-bit symmetric per-channel"


def test_transforms_run_in_the_order_they_were_added() -> None:
    seen: list[str] = []

    @attrs.frozen
    class Noted(Transform):
        kind = "tests.noted"
        name: str

        def apply(self, model: nn.Module) -> None:
            seen.append(self.name)

    Quantizer().transform(Noted("a"), Noted("b")).transform(Noted("c")).apply(model())
    assert seen == ["a", "b", "c"]


CONFLICTS: dict[str, Call] = {
    "scheme after bits": lambda q: q.bits(4).scheme(Affine(4)),
    "bits after scheme": lambda q: q.scheme(Affine(4)).bits(4),
    "symmetric after scheme": lambda q: q.scheme(Affine(4)).symmetric(),
    "asymmetric after scheme": lambda q: q.scheme(Affine(4)).asymmetric(),
    "granularity after scheme": lambda q: q.scheme(Affine(4)).granularity("tensor"),
    "group size after scheme": lambda q: q.scheme(Affine(4)).group_size(32),
    "scale dtype after scheme": lambda q: q.scheme(Affine(4)).scale_dtype(torch.float32),
    "scheme after group size": lambda q: q.group_size(32).scheme(FloatCast()),
    "a symmetric cast": lambda q: q.bits(16).symmetric(),
    "a cast of groups": lambda q: q.group_size(32).bits(16),
    "a cast with scales": lambda q: q.bits(16).scale_dtype(torch.float32),
    "groups after another granularity": lambda q: q.granularity("channel").group_size(32),
    "two granularities": lambda q: q.override("0", granularity="channel", group_size=32),
    "an override with two grids": lambda q: q.override("0", bits=4, scheme=Affine(4)),
    "an override that says nothing": lambda q: q.override("0"),
    "one bit": lambda q: q.bits(1),
    "nine bits": lambda q: q.bits(9),
    "a flag for a width": lambda q: q.bits(True),
    "an empty group": lambda q: q.group_size(0),
    "a group of a flag": lambda q: q.group_size(True),
    "an unknown granularity": lambda q: q.granularity("row"),
    "an unknown granularity for some": lambda q: q.override("0", granularity="row"),
    "one bit for some": lambda q: q.override("0", bits=1),
    "no observer": lambda q: q.observer(),
    "too many observers": lambda q: q.observer(MinMax(), weights=MinMax()),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_a_conflict_is_an_error_at_the_call_that_makes_it(name: str) -> None:
    with pytest.raises(ConfigurationError):
        CONFLICTS[name](Quantizer())


def test_a_part_for_some_contradicts_a_cast_for_all() -> None:
    with pytest.raises(ConfigurationError, match="a cast: it has no granularity"):
        Quantizer().bits(16).override("0", group_size=32).plan(model())


@pytest.mark.parametrize("selector", [3, None, ("a",), int])
@pytest.mark.parametrize("name", ["only", "skip"])
def test_what_selects_nothing_is_refused_at_the_call(name: str, selector: object) -> None:
    method: Callable[[object], Quantizer] = getattr(Quantizer(), name)
    with pytest.raises(ConfigurationError, match="selects no layers"):
        method(selector)


def test_a_layer_is_an_instance_that_knows_layers() -> None:
    method: Callable[[object], Quantizer] = getattr(Quantizer(), "layer")  # noqa: B009
    for wrong in (LinearQuantizer, nn.Linear(1, 1), "Linear"):
        with pytest.raises(ConfigurationError, match="takes instances of LayerQuantizer"):
            method(wrong)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the data is empty"),
        (iter([torch.zeros(1)]), "can be gone through only once"),
        ((x for x in [torch.zeros(1)]), "can be gone through only once"),
        ("data.pt", "a str holds no batches"),
        (3, "a int holds no batches"),
        (None, "a NoneType holds no batches"),
    ],
    ids=["empty", "iterator", "generator", "text", "number", "none"],
)
def test_data_that_cannot_be_used_is_refused_before_anything_runs(
    data: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Quantizer().fit(data)


def test_a_sample_count_is_positive() -> None:
    with pytest.raises(InputError, match="samples is 1 or more, not 0"):
        Quantizer().fit(torch.zeros(1, 128), samples=0)


@pytest.mark.parametrize(
    "data",
    [
        noise(6, 128),
        [noise(2, 128), noise(4, 128)],
        [(noise(2, 128), torch.zeros(2)), (noise(4, 128), torch.zeros(4))],
        {"input": noise(6, 128)},
        TensorDataset(noise(6, 128)),
        DataLoader(TensorDataset(noise(6, 128)), batch_size=4),
    ],
    ids=["tensor", "list", "pairs with labels", "mapping", "dataset", "loader"],
)
def test_data_comes_in_many_shapes_and_may_be_used_again(data: object) -> None:
    quantizer = Quantizer().fit(data)
    first, second = (quantizer.apply(model(), progress=False).report for _ in range(2))
    assert first.samples == second.samples == 6
    assert first.output_sqnr_db is not None
    assert first.output_sqnr_db > 20


def test_plan_says_what_apply_does() -> None:
    quantizer = Quantizer().bits(4).fit(noise(3, 128))
    torch.manual_seed(0)
    of = model()
    planned, applied = quantizer.plan(of).run(progress=False), quantizer.apply(of, progress=False)
    assert planned.report == applied.report
    assert planned.plan.explain() == applied.plan.explain() == str(quantizer.plan(of))


def test_plan_and_apply_leave_the_model_alone_and_apply_underscore_does_not() -> None:
    of = model()
    before = {name: value.clone() for name, value in of.state_dict().items()}
    Quantizer().plan(of)
    result = Quantizer().apply(of, progress=False)
    assert type(result.model) is nn.Sequential
    assert [type(layer) for layer in of] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
    assert all(torch.equal(value, before[name]) for name, value in of.state_dict().items())
    assert Quantizer().apply_(of, progress=False).model is of
    assert all(isinstance(layer, QuantizedModule) for layer in of if type(layer) is not nn.ReLU)


@pytest.mark.parametrize("given_model", [3, "model.pt", [nn.Linear(1, 1)], nn.Linear])
def test_what_is_no_model_is_refused(given_model: object) -> None:
    method: Callable[[object], object] = getattr(Quantizer(), "plan")  # noqa: B009
    with pytest.raises(InputError, match=r"is no model: give a torch.nn.Module or a state dict"):
        method(given_model)


def test_data_has_no_use_for_a_state_dict() -> None:
    with pytest.raises(InputError, match="a state dict cannot be run"):
        Quantizer().fit(noise(1, 128)).plan(model().state_dict())


# --- low widths -------------------------------------------------------------------------------


class Language(nn.Module):
    """An embedding, a large and a small layer, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 64)
        self.bags = nn.EmbeddingBag(50, 64)
        self.large = nn.Linear(64, 64)
        self.just = nn.Linear(64, 8)
        self.small = nn.Linear(73, 7)
        self.norm = nn.LayerNorm(64)


EMBEDDING = "float: embeddings stay float below 8 bits unless asked for"
SMALL = "float: fewer than 512 values, below 8 bits unless asked for"


@pytest.mark.parametrize("bits", range(2, 8))
def test_below_8_bits_embeddings_and_small_layers_stay_float(bits: int) -> None:
    grid = f"{bits}-bit asymmetric per-group 64"
    assert fates(Quantizer().bits(bits), Language()) == {
        "words.weight": EMBEDDING,
        "bags.weight": EMBEDDING,
        "large.weight": grid,
        "just.weight": grid,  # 512 values
        "small.weight": SMALL,  # 511
    }


@pytest.mark.parametrize("quantizer", [Quantizer(), Quantizer().bits(8), Quantizer().bits(16)])
def test_from_8_bits_on_nothing_stays_float_by_default(quantizer: Quantizer) -> None:
    assert not any(fate.startswith("float:") for fate in fates(quantizer, Language()).values())


def test_a_scheme_of_few_bits_has_the_same_defaults() -> None:
    found = fates(Quantizer().scheme(Affine(4)), Language())
    assert found["words.weight"] == EMBEDDING
    assert found["small.weight"] == SMALL


ASKING: list[Call] = [
    lambda q: q.only("words", "small", "large"),
    lambda q: q.only("*"),
    lambda q: q.only(nn.Embedding, nn.Linear),
    lambda q: q.override("words", bits=4).override("small", bits=4),
    lambda q: q.override("*", symmetric=False),
    lambda q: q.override(lambda name, module: name in {"words", "small"}, bits=4),
]


@pytest.mark.parametrize("place", range(len(ASKING)))
def test_a_layer_that_is_named_is_quantized_at_any_width(place: int) -> None:
    found = fates(ASKING[place](Quantizer().bits(4)), Language())
    assert found["words.weight"] == "4-bit asymmetric per-group 64"
    assert found["small.weight"] == "4-bit asymmetric per-channel"


def test_a_layer_overridden_to_8_bits_is_quantized_at_8_bits() -> None:
    found = fates(Quantizer().bits(4).override("words", bits=8), Language())
    assert found["words.weight"].startswith("8-bit")
    assert found["small.weight"] == SMALL


def test_asking_for_a_layer_does_not_lift_skip() -> None:
    found = fates(Quantizer().bits(4).override("words", bits=8).skip("words"), Language())
    assert found["words.weight"] == "float: skipped"


def test_a_norm_is_known_to_no_quantizer() -> None:
    assert layer_rows(Quantizer().bits(4), Language())["norm"].fate == (
        "float: no quantizer knows a LayerNorm"
    )


def test_a_group_size_that_does_not_divide_leaves_the_layer_float_with_the_reason() -> None:
    found = fates(Quantizer().bits(4).group_size(48), model())
    assert found["0.weight"] == "float: a group of 48 does not divide a row of 128"
    result = Quantizer().bits(4).group_size(48).only("*").apply(model(), progress=False)
    assert type(result.model[0]) is nn.Linear
    assert not result.report.quantized


def test_a_group_size_that_was_not_asked_for_gives_way_to_channels() -> None:
    assert fates(Quantizer().bits(4).only("3"), model())["3.weight"] == (
        "4-bit asymmetric per-channel"
    )


# --- written down -----------------------------------------------------------------------------

NAMESPACE: dict[str, object] = {**vars(mono_quant), "torch": torch, "Doubled": Doubled}
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
        made = made.observer(draw(st.sampled_from([MinMax(), MSE(steps=9)])))
    if draw(st.booleans()):
        made = made.observer(activations=MinMax())
    if draw(st.booleans()):
        made = made.rounding(RoundToNearest())
    made = made.only(*draw(PATTERNS)).skip(*draw(PATTERNS))
    for pattern in draw(PATTERNS):
        made = made.override(pattern, bits=draw(st.integers(2, 8)), observer=MSE(smallest=0.5))
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
    of = model()
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
    config = Quantizer().skip("0*").plan(model()).outline.config
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
        ({"activation_observer": {"kind": "affine"}}, ConfigurationError, "a RangeEstimator"),
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


def test_activation_observers_are_kept_and_said_to_have_no_use_yet() -> None:
    made = Quantizer().observer(weights=MSE(), activations=MinMax())
    assert repr(made) == (
        "Quantizer().observer(MSE(steps=80, smallest=0.4)).observer(activations=MinMax())"
    )
    assert "MinMax() watches nothing yet" in made.plan(model()).explain()


def test_the_tied_model_has_one_weight_under_two_names() -> None:
    of = TiedModel()
    assert fates(Quantizer(), of)["embedding.weight"] == (
        "8-bit symmetric per-channel; also head.weight"
    )
