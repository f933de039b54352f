"""Names, types, modules and functions, and the layers that they mean."""

import pytest
from torch import nn

from mono_quant import ConfigurationError, InputError, Quantizer
from mono_quant.selection import Selection, Selector, check_selector, matches_name


class Block(nn.Module):
    """A block of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


class Model(nn.Module):
    """Eleven blocks, so that block 1 is not block 10, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(11))
        self.head = nn.Linear(8, 4)


MODEL = Model()
SELECTION = Selection.of(MODEL)
ALL = frozenset(name for name, _ in MODEL.named_modules())


def below(*roots: str) -> frozenset[str]:
    return frozenset(
        name for name in ALL if any(name == root or name.startswith(f"{root}.") for root in roots)
    )


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("head", "head", True),
        ("head", "head.weight", True),
        ("head", "heads", False),
        ("head", "blocks.head", False),
        ("*head", "blocks.head", True),
        ("blocks.1", "blocks.1", True),
        ("blocks.1", "blocks.10", False),
        ("blocks.1", "blocks.1.mlp.0", True),
        ("blocks.?", "blocks.10", False),
        ("blocks.?", "blocks.9.mlp", True),
        ("*.mlp", "blocks.3.mlp.2", True),
        ("blocks*", "blocks.3.mlp.2", True),
        ("*.2", "blocks.3.mlp.2", True),
        ("mlp", "blocks.3.mlp.2", False),
        ("*", "anything.at.all", True),
        ("Head", "head", False),
        ("a[0]", "a[0].b", True),  # a name is itself, whatever it holds
    ],
)
def test_a_pattern_matches_a_name_or_one_of_its_ancestors(
    pattern: str, name: str, matches: bool
) -> None:
    assert matches_name(pattern, name) is matches


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("head", {"head"}),
        ("blocks.1", below("blocks.1")),
        ("blocks.?", below(*(f"blocks.{i}" for i in range(10)))),
        ("blocks.1?", below("blocks.10")),
        ("*.mlp", below(*(f"blocks.{i}.mlp" for i in range(11)))),
        ("blocks", below("blocks")),
        ("*", ALL),
        ("", ALL),
        (nn.Embedding, {"embedding"}),
        (nn.ReLU, {f"blocks.{i}.mlp.1" for i in range(11)}),
        (Block, below(*(f"blocks.{i}" for i in range(11)))),
        (nn.Module, ALL),
        (MODEL.head, {"head"}),
        (MODEL.blocks[3], below("blocks.3")),
        (lambda name, module: "att" in name, {f"blocks.{i}.attention" for i in range(11)}),
        (lambda name, module: isinstance(module, Block) and "10" in name, below("blocks.10")),
    ],
)
def test_a_selector_means_layers_and_all_below_them(
    selector: Selector, names: frozenset[str]
) -> None:
    assert SELECTION.names(selector) == names


def test_roots_are_the_names_that_a_selector_itself_means_in_order() -> None:
    assert SELECTION.roots(Block)[:3] == ["blocks.0", "blocks.1", "blocks.2"]
    assert SELECTION.roots(MODEL.head) == ["head"]
    assert SELECTION.roots(lambda name, module: module is MODEL.blocks[1]) == ["blocks.1"]


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("haed", "'haed' matches no layer of the model; did you mean 'head'?"),
        ("block.3", "'block.3' matches no layer of the model; did you mean 'blocks.3' or"),
        ("zzz", r"no layer of the model; it has 'embedding', 'blocks', 'blocks.0', \.\.\.$"),
        (nn.LSTM, "LSTM matches no layer of the model"),
        (nn.Linear(8, 8), r"Linear\(in_features=8.* matches no layer of the model"),
        (lambda name, module: False, "matches no layer of the model"),
    ],
)
def test_a_selector_that_means_nothing_is_a_slip_of_the_pen(
    selector: Selector, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SELECTION.roots(selector)


def test_a_function_answers_with_a_bool() -> None:
    def careless(name: str, module: nn.Module) -> bool:
        found: object = name or None
        return found  # type: ignore[return-value]  # what a test is for

    with pytest.raises(InputError, match=r"careless.* returned None for '', not a bool"):
        SELECTION.roots(careless)


@pytest.mark.parametrize("selector", [3, None, 1.5, ["head"], ("head",), int, str, object])
def test_what_selects_nothing_is_refused(selector: object) -> None:
    with pytest.raises(ConfigurationError, match="selects no layers: give a name"):
        check_selector(selector)


@pytest.mark.parametrize("selector", ["head", nn.Linear, MODEL.head, lambda name, module: True])
def test_what_selects_is_handed_back(selector: object) -> None:
    assert check_selector(selector) is selector


def test_a_name_of_odd_characters_survives_a_configuration() -> None:
    model = nn.ModuleDict({"a[0]": nn.Linear(32, 32), "a*": nn.Linear(32, 32)})
    plan = Quantizer().skip(model["a[0]"]).plan(model)
    again = Quantizer.from_config(plan.outline.config).plan(model)
    assert again.explain() == plan.explain()
    assert [row.scheme for row in plan.outline.report.quantized] == ["8-bit symmetric per-channel"]


def test_a_module_of_two_names_is_meant_by_either() -> None:
    model = nn.Module()
    model.one = nn.Linear(32, 32)
    model.two = model.one
    for name in ("one", "two"):
        assert Selection.of(model).roots(name) == [name]
        report = Quantizer().skip(name).plan(model).outline.report
        assert [row.reason for row in report.layers if row.shape] == ["skipped"]
    assert Selection.of(model).roots(model.one) == ["one", "two"]


def test_a_model_that_is_one_layer_has_the_empty_name() -> None:
    layer = nn.Linear(8, 8)
    selection = Selection.of(layer)
    for selector in ("", "*", nn.Linear, layer):
        assert selection.roots(selector) == [""]
    assert selection.roots("weight") == ["weight"], "its only weight has a name too"
    with pytest.raises(ConfigurationError, match="matches no layer"):
        selection.roots("bias")


def test_one_weight_of_a_layer_may_be_named() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(64, 64, num_layers=2), "out": nn.Linear(64, 64)})
    quantizer = Quantizer().override("lstm.weight_ih_l0", bits=16).skip("*.weight_hh_l1")
    rows = {row.name: row for row in quantizer.plan(model).outline.report.layers}
    assert rows["lstm.weight_ih_l0"].scheme == "float16"
    assert rows["lstm.weight_hh_l0"].scheme == "8-bit symmetric per-channel"
    assert rows["lstm.weight_hh_l1"].reason == "skipped"
    assert rows["out.weight"].scheme == "8-bit symmetric per-channel"
    only = Quantizer().only("lstm.weight_ih_l1").plan(model).outline.report
    assert [row.name for row in only.quantized] == ["lstm.weight_ih_l1"]
    with pytest.raises(ConfigurationError, match="matches no layer"):
        Quantizer().skip("lstm.bias_ih_l0").plan(model)
