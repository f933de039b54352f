"""Which layers' inputs may be scaled: found in the code or on data, and tried on data."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import Affine, Grid, MinMax, PerTensor, Target, TransformContext
from mono_quant.transforms.groups import Group, find_groups
from mono_quant.transforms.probing import NOWHERE, Link, Probe
from tests.helpers import noise
from tests.transforms.wirings import FOUR, WIDTH, WIRINGS, Attending, Convolving, Joined, aimed


def groups_of(
    name: str,
) -> tuple[nn.Module, Tensor, dict[str, Group], dict[str, tuple[str, ...]]]:
    make, shape, expected = WIRINGS[name]
    torch.manual_seed(0)
    model, x = make().double().eval(), noise(*shape).double()
    groups, _ = find_groups(model, aimed(model, FOUR, x))
    return model, x, {one.source: one for one in groups}, expected


@pytest.mark.parametrize("name", WIRINGS)
def test_the_groups_of_a_model_are_found(name: str) -> None:
    _, _, groups, expected = groups_of(name)
    assert {source: one.layers for source, one in groups.items()} == expected
    assert {one.untraced is None for one in groups.values()} == {"untraced" not in name}


@pytest.mark.parametrize("name", WIRINGS)
def test_scaling_a_group_by_anything_leaves_the_model_as_it_was(name: str) -> None:
    model, x, groups, _ = groups_of(name)
    before = [one.detach().clone() for one in model.parameters()]
    with torch.no_grad():
        expected = model(x)
        for group in groups.values():
            twin = copy.deepcopy(model)
            undo = group.apply(twin, noise(group.width).double().exp())
            assert callable(undo)
            torch.testing.assert_close(twin(x), expected, rtol=0, atol=1e-12)
            changed = zip(twin.parameters(), before, strict=True)
            assert sum(not torch.equal(one, other) for one, other in changed) > 1
            undo()
            for one, other in zip(twin.parameters(), before, strict=True):
                assert torch.equal(one, other)


def test_heads_that_are_shared_are_told_apart() -> None:
    model = Attending().double().eval()
    groups, _ = find_groups(model, aimed(model, FOUR, noise(3, 5, WIDTH).double()))
    (places,) = (one.channels["output"] for one in groups if one.source == "value")
    heads = torch.arange(8).reshape(2, 1, 4)  # [heads of values, shared by, head width]
    assert torch.equal(places, heads.expand(2, 2, 4).flatten())


def test_a_channel_at_several_places_is_found_at_all_of_them() -> None:
    model = Convolving().double().eval()
    groups, _ = find_groups(model, aimed(model, FOUR, 1 + noise(3, 3, 10, 10).double()))
    (places,) = (one.channels["head"] for one in groups if one.source == "second")
    assert torch.equal(places, torch.arange(12).repeat_interleave(4))


def test_channels_from_elsewhere_stay() -> None:
    model = Joined().double().eval()
    (group,), _ = find_groups(model, aimed(model, FOUR, noise(9, WIDTH).double()))
    elsewhere = torch.full((8 + WIDTH,), NOWHERE)
    assert torch.equal(group.channels["last"], torch.cat([torch.arange(8), elsewhere]))
    spread = group.spread(torch.arange(1.0, 9.0), "last")
    assert torch.equal(spread[8:], torch.ones(8 + WIDTH))


class Three(nn.Module):
    """A norm and two layers, called as a function says."""

    def __init__(self, function: Callable[["Three", Tensor], object]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


REFUSED: dict[str, tuple[Callable[[Three, Tensor], object], str, str]] = {
    "a residual of a norm": (
        lambda m, x: (hidden := m.norm(x)) + m.a(hidden),
        "a",
        "of 'norm': its output feeds an addition, which does not pass a scale on",
    ),
    "an output of the model": (
        lambda m, x: (hidden := m.norm(x), m.a(hidden)),
        "a",
        "of 'norm': its output is an output of the model",
    ),
    "a function that does not pass a scale on": (
        lambda m, x: m.a(functional.gelu(m.norm(x))),
        "a",
        "its input comes from gelu()",
    ),
    "something added": (lambda m, x: m.a(m.norm(x) + 1), "a", "its input comes from an addition"),
    "a product with itself": (
        lambda m, x: m.a((hidden := m.norm(x)) * hidden),
        "a",
        "its input comes from mul()",
    ),
    "a quotient by it": (lambda m, x: m.a(1 / m.norm(x)), "a", "its input comes from truediv()"),
    "a layer that is called twice": (
        lambda m, x: m.a(m.norm(x)) + m.a(x),
        "a",
        "of 'norm': 'a' is called 2 times",
    ),
    "a layer beside that sees it through a tanh": (
        lambda m, x: m.a(hidden := m.norm(x)) + m.b(torch.tanh(hidden)),
        "a",
        "of 'norm': its output feeds tanh(), which does not pass a scale on",
    ),
    "channels that are mixed": (
        lambda m, x: m.a(m.norm(x).mean(-1, keepdim=True).expand(-1, WIDTH)),
        "a",
        "of 'norm': a factor of it does not reach 'a' as it is, on the data",
    ),
    "a weight that is read": (
        lambda m, x: m.a(m.norm(x)) + m.a.weight.sum(),
        "a",
        "of 'a': sum() reads its weight",
    ),
    "a norm whose weight is read": (
        lambda m, x: m.a(m.norm(x)) * m.norm.weight,
        "a",
        "of 'norm': mul() reads its weight",
    ),
    "the input of the model": (lambda m, x: m.a(x), "a", "its input comes from the model's input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scaled_is_refused(name: str) -> None:
    function, layer, reason = REFUSED[name]
    model = Three(function).double().eval()
    groups, reasons = find_groups(model, aimed(model, FOUR, noise(9, WIDTH).double()))
    assert not any(layer in one.layers for one in groups)
    assert reasons[layer] == reason


UNSEEN: dict[str, Callable[[Three, Tensor], object]] = {
    "a residual": lambda m, x: (hidden := m.norm(x)) + m.a(hidden),
    "a sum that hardly matters": lambda m, x: m.a(hidden := m.norm(x)) + 1e-9 * hidden.sum(),
    "a gelu": lambda m, x: m.a(functional.gelu(m.b(x))),
    "a square": lambda m, x: m.a(m.b(x).square()),
    "a clamp": lambda m, x: m.a(m.b(x).clamp(-1, 1)),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_where_code_cannot_be_traced_the_data_shows_what_no_hook_sees(name: str) -> None:
    def branching(model: Three, x: Tensor) -> object:
        return UNSEEN[name](model, x * 2 if x.sum() > 1e9 else x)

    model = Three(branching).double().eval()
    groups, reasons = find_groups(model, aimed(model, FOUR, noise(9, WIDTH).double()))
    assert groups == ()
    assert "on the data" in reasons["a"]


def test_one_that_fails_does_not_cost_the_others() -> None:
    def branching(model: nn.Module, x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x) if x.sum() < 1e9 else x
        return x

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(blocks)

        def forward(self, x: Tensor) -> Tensor:
            return branching(self, x)

    good, bad = (lambda m, x: x + m.a(m.norm(x))), UNSEEN["a residual"]
    blocks = [Three(good), Three(bad), Three(good), Three(good), Three(bad)]
    model = Many().double().eval()
    groups, reasons = find_groups(model, aimed(model, FOUR, noise(9, WIDTH).double()))
    assert [one.source for one in groups] == [f"blocks.{place}.norm" for place in (0, 2, 3)]
    for place in (1, 4):
        assert "something else sees its output" in reasons[f"blocks.{place}.a"]


def test_channels_that_are_zero_are_known_where_all_others_stay_in_their_places() -> None:
    class Dead(nn.Module):
        def __init__(self, shuffled: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.shuffled = shuffled
            nn.init.constant_(self.a.bias, -100)
            with torch.no_grad():
                self.a.bias[2:] = 0

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.a(x))
            result: Tensor = self.b(hidden.flip(-1) if self.shuffled else hidden)
            return result

    x = noise(50, WIDTH).double()
    for shuffled in (False, True):
        model = Dead(shuffled).double().eval()
        groups, reasons = find_groups(model, aimed(model, FOUR, x))
        assert bool(groups) is not shuffled
        if shuffled:
            assert "is zero on the data in some channels" in reasons["b"]
        else:
            assert torch.equal(groups[0].channels["b"], torch.arange(WIDTH))


def test_a_model_that_is_not_the_same_twice_cannot_be_tried() -> None:
    model = Three(lambda m, x: m.a(m.norm(x))).double().eval()
    calls: list[int] = []

    def outputs(of: nn.Module) -> Iterator[list[Tensor]]:
        calls.append(1)
        with torch.no_grad():
            yield [of(noise(9, WIDTH).double()) + len(calls)]

    link = Link("a", ("b",))
    (reason,) = Probe(model, TransformContext(outputs), {}).channels([link]).values()
    assert isinstance(reason, str)
    assert "two runs on the same data are not equal to the bit" in reason


def test_a_model_that_fails_on_what_is_tried_is_left_alone() -> None:
    def checking(model: Three, x: Tensor) -> object:
        hidden = model.norm(x)
        if hidden.abs().max() > 100:
            raise RuntimeError("too large")
        return model.a(hidden)

    model = Three(checking).double().eval()
    groups, reasons = find_groups(model, aimed(model, FOUR, noise(9, WIDTH).double()))
    assert groups == ()
    assert "the model fails on the data once its output is scaled" in reasons["a"]
    assert "too large" in reasons["a"]


def test_half_precision_is_tried_within_its_range() -> None:
    model = Three(lambda m, x: m.a(m.norm(x))).half().eval()
    x = noise(9, WIDTH).half()
    (group,), _ = find_groups(model, aimed(model, FOUR, x))
    assert torch.equal(group.channels["a"], torch.arange(WIDTH))


def test_hooks_ties_and_shared_scales_are_refused() -> None:
    chain: Callable[[Three, Tensor], object] = lambda m, x: m.b(m.a(x))  # noqa: E731
    x = noise(9, WIDTH).double()

    model = Three(chain).double().eval()
    model.a.register_forward_hook(lambda module, args, output: None)
    assert find_groups(model, aimed(model, FOUR, x))[1]["b"] == "'a' has hooks"

    model = Three(chain).double().eval()
    model.b.weight = model.a.weight
    assert "is also that of" in find_groups(model, aimed(model, FOUR, x))[1]["b"]

    model = Three(chain).double().eval()
    whole = Target(Grid(Affine(8, True, PerTensor()), MinMax()))
    assert "rows of 'a' share a scale" in find_groups(model, aimed(model, whole, x))[1]["b"]
