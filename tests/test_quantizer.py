"""The builder: every call gives a new quantizer, and says what it replaces or adds."""

import functools
from collections.abc import Callable

import attrs
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mono_quant import (
    MSE,
    Affine,
    CalibrationStatistics,
    Change,
    ConfigurationError,
    ConvQuantizer,
    FloatCast,
    InputError,
    LinearLikeQuantizer,
    LinearQuantizer,
    MinMax,
    PerGroup,
    QuantizedModule,
    Quantizer,
    RoundToNearest,
    Transform,
    TransformContext,
)
from mono_quant.base import WITHOUT_DATA
from tests.helpers import WEIGHTS_ONLY, Doubled, fates, noise, three_layers

Call = Callable[[Quantizer], Quantizer]


CALLS: dict[str, Call] = {
    "bits": lambda q: q.bits(4),
    "symmetric": lambda q: q.symmetric(),
    "asymmetric": lambda q: q.asymmetric(),
    "granularity": lambda q: q.granularity("tensor"),
    "group_size": lambda q: q.group_size(32),
    "scale_dtype": lambda q: q.scale_dtype(torch.float32),
    "float_zero_point": lambda q: q.float_zero_point(),
    "outliers": lambda q: q.outliers(2),
    "quality": lambda q: q.quality("best"),
    "scheme": lambda q: q.scheme(Affine(3)),
    "observer": lambda q: q.observer(MSE()),
    "activations": lambda q: q.activations("dynamic"),
    "fold": lambda q: q.fold(),
    "on_damage": lambda q: q.on_damage("keep"),
    "rounding": lambda q: q.rounding(RoundToNearest()),
    "only": lambda q: q.only("0"),
    "skip": lambda q: q.skip("0"),
    "override": lambda q: q.override("0", bits=8),
    "layer": lambda q: q.layer(LinearLikeQuantizer("a.b")),
    "transform": lambda q: q.transform(Doubled()),
    "fit": lambda q: q.fit(torch.zeros(2, 128)),
    "measure_on": lambda q: q.measure_on(torch.zeros(2, 128)),
    "statistics": lambda q: q.statistics(CalibrationStatistics({})),
    "only_if_faster": lambda q: q.only_if_faster(torch.zeros(2, 128)),
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
    others = {"plan", "apply", "apply_", "graph", "to_config", "from_config"}
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
    assert fates(calls(WEIGHTS_ONLY), three_layers())["0.weight"] == words


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
    assert repr(made) == (
        "Quantizer().scale_dtype(torch.float32).observer(weights=MinMax())"
        ".observer(activations=MinMax()).fit(<list>)"
    )
    assert made.apply(three_layers(), progress=False).report.samples == 3


def test_skip_adds_to_earlier_patterns() -> None:
    found = fates(Quantizer().skip("0").skip("2", "3"), three_layers())
    assert list(found.values()) == ["float: skipped"] * 3


def test_only_adds_to_earlier_patterns() -> None:
    found = fates(WEIGHTS_ONLY.only("0").only("3"), three_layers())
    assert found["2.weight"] == "float: not among only(...)"
    assert found["0.weight"] == found["3.weight"] == "8-bit symmetric per-channel"


def test_skip_goes_before_only() -> None:
    found = fates(Quantizer().only("0", "2").skip("2"), three_layers())
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
    assert fates(made, three_layers()) == {
        "0.weight": "4-bit symmetric per-group 32",
        "2.weight": "6-bit symmetric per-group 16",
        "3.weight": "4-bit symmetric per-group 32",
    }


def test_overrides_that_only_fit_in_another_order_say_which() -> None:
    def ordered(*names: str) -> Quantizer:
        settings = {
            "0": lambda q: q.override("0", bits=16),
            "*": lambda q: q.override("*", activations="dynamic"),
            "2": lambda q: q.override("2", bits=4),
        }
        return functools.reduce(lambda q, name: settings[name](q), names, Quantizer())

    model = three_layers()
    for names in (("0", "*"), ("2", "0", "*"), ("0", "2", "*")):
        with pytest.raises(
            ConfigurationError,
            match=r"its activations cannot be quantized; the override of '\*' comes after that of "
            r"'0', and the last one wins: say that of '\*' first$",
        ):
            ordered(*names).plan(model)
    plan = ordered("*", "0", "2").plan(model)
    assert next(one.recipe.grid.scheme.code_bits for one in plan.weights if one.recipe) is None
    with pytest.raises(ConfigurationError, match=r"its activations cannot be quantized$"):
        Quantizer().override("0", bits=16, activations="dynamic")


def test_an_override_changes_only_what_it_says() -> None:
    made = WEIGHTS_ONLY.bits(4).group_size(32).override("0", bits=8)
    assert fates(made, three_layers())["0.weight"] == "8-bit symmetric per-group 32"
    made = Quantizer().bits(4).asymmetric().override("0", granularity="tensor")
    assert fates(made, three_layers())["0.weight"] == "4-bit asymmetric per-tensor"


def test_an_override_by_a_scheme_replaces_all_of_the_grid() -> None:
    made = Quantizer().bits(4).group_size(32).override("0", scheme=FloatCast())
    assert fates(made, three_layers())["0.weight"] == "float16"


def test_an_override_of_a_part_replaces_the_scheme_for_all() -> None:
    made = Quantizer().scheme(Affine(3)).override("0", bits=5)
    assert fates(made, three_layers())["0.weight"] == "5-bit asymmetric per-group 64"
    assert fates(made, three_layers())["2.weight"] == "3-bit symmetric per-channel"


def test_layers_add_and_go_before_the_built_in_ones() -> None:
    class Own(nn.Linear):
        """A linear layer with a forward of its own."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    of = nn.Sequential(Own(64, 64))
    refused = fates(Quantizer().layer(ConvQuantizer()), of)["0.weight"]
    assert refused.startswith("float: Own is a Linear with a forward of its own")
    made = WEIGHTS_ONLY.layer(ConvQuantizer()).layer(LinearQuantizer(own_forward=True))
    assert fates(made, of)["0.weight"] == "8-bit symmetric per-channel"


def test_transforms_run_in_the_order_they_were_added() -> None:
    seen: list[str] = []

    @attrs.frozen
    class Noted(Transform):
        kind = "tests.noted"
        name: str

        def apply(
            self, model: nn.Module, context: TransformContext = WITHOUT_DATA
        ) -> tuple[Change, ...]:
            seen.append(self.name)
            return ()

    Quantizer().transform(Noted("a"), Noted("b")).transform(Noted("c")).apply(three_layers())
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
    "a cast with outliers": lambda q: q.bits(16).outliers(),
    "outliers of a scheme": lambda q: q.scheme(Affine(4)).outliers(),
    "no outliers": lambda q: q.outliers(0),
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
    "no name of an observer": lambda q: q.observer("ems"),
    "the class of an observer": lambda q: q.observer(MSE),  # type: ignore[arg-type]  # refused
    "the class of a rounding": lambda q: q.rounding(RoundToNearest),  # type: ignore[arg-type]  # refused
    "the class of a scheme": lambda q: q.scheme(Affine),  # type: ignore[arg-type]  # refused
    "scales of whole numbers": lambda q: q.scale_dtype(torch.int8),
    "a symmetry in words": lambda q: q.symmetric("yes"),  # type: ignore[arg-type]  # refused
    "a list of granularities": lambda q: q.granularity(["group"]),  # type: ignore[arg-type]  # refused
    "the name of a transform": lambda q: q.transform("fold"),  # type: ignore[arg-type]  # refused
    "the class of a transform": lambda q: q.transform(Doubled),  # type: ignore[arg-type]  # refused
    "folding in words": lambda q: q.fold("no"),  # type: ignore[arg-type]  # refused
    "too many observers": lambda q: q.observer(MinMax(), weights=MinMax()),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_a_conflict_is_an_error_at_the_call_that_makes_it(name: str) -> None:
    with pytest.raises(ConfigurationError):
        CONFLICTS[name](Quantizer())


def test_a_part_for_some_contradicts_a_cast_for_all() -> None:
    with pytest.raises(ConfigurationError, match="a cast: it has no granularity"):
        Quantizer().bits(16).override("0", group_size=32).plan(three_layers())


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
    with pytest.raises(InputError, match="samples is 1 or more, not 3"):
        Quantizer().fit(torch.zeros(1, 128), samples="3")  # type: ignore[arg-type]  # the point


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
    first, second = (quantizer.apply(three_layers(), progress=False).report for _ in range(2))
    assert first.samples == second.samples == 6
    assert first.output_sqnr_db is not None
    assert first.output_sqnr_db > 20


def test_plan_says_what_apply_does() -> None:
    quantizer = Quantizer().bits(4).fit(noise(3, 128))
    torch.manual_seed(0)
    of = three_layers()
    planned, applied = quantizer.plan(of).run(progress=False), quantizer.apply(of, progress=False)
    assert planned.report == applied.report
    assert planned.plan.explain() == applied.plan.explain() == str(quantizer.plan(of))


def test_plan_and_apply_leave_the_model_alone_and_apply_underscore_does_not() -> None:
    of = three_layers()
    before = {name: value.clone() for name, value in of.state_dict().items()}
    Quantizer().plan(of)
    result = Quantizer().apply(of, progress=False)
    assert type(result.model) is nn.Sequential
    assert [type(layer) for layer in of] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
    assert all(torch.equal(value, before[name]) for name, value in of.state_dict().items())
    assert Quantizer().apply_(of, progress=False).model is of
    first, activation, *others = of
    assert all(isinstance(layer, QuantizedModule) for layer in (first, *others))
    assert type(activation) is nn.Identity  # the first layer computes it


@pytest.mark.parametrize("given_model", [3, "model.pt", [nn.Linear(1, 1)]])
def test_what_is_no_model_is_refused(given_model: object) -> None:
    method: Callable[[object], object] = getattr(Quantizer(), "plan")  # noqa: B009
    with pytest.raises(InputError, match=r"is no model: give a torch.nn.Module or a state dict"):
        method(given_model)


def test_data_has_no_use_for_a_state_dict() -> None:
    with pytest.raises(InputError, match="a state dict cannot be run"):
        Quantizer().fit(noise(1, 128)).plan(three_layers().state_dict())


def test_a_class_or_a_name_where_an_instance_is_meant_says_which() -> None:
    with pytest.raises(
        InputError, match=r"Linear is a class and no model yet: give Linear\(\.\.\.\)"
    ):
        Quantizer().plan(nn.Linear)  # type: ignore[call-overload]  # it is what is refused
    with pytest.raises(ConfigurationError, match=r"scheme\(create_scheme\('nf4'\)\), not 'nf4'"):
        Quantizer().scheme("nf4")  # type: ignore[arg-type]  # it is what is refused
