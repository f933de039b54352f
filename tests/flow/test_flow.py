"""Graphs of codes beside the model that keeps its class."""

import copy
import io

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from mono_quant import InputError, Quantizer
from mono_quant.flow import integer_flow
from mono_quant.flow.arithmetic import add
from mono_quant.flow.layer import IntegerLayer
from mono_quant.numerics.metrics import sqnr_db
from tests.flow.marks import needs_integers
from tests.flow.models import Joined, Padding, ResNet, static


def layers(model: nn.Module) -> list[IntegerLayer]:
    return [module for module in model.modules() if isinstance(module, IntegerLayer)]


@torch.no_grad()
def given(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the codes that each layer of a graph is given."""
    found: dict[str, Tensor] = {}
    names = {module: name for name, module in model.named_modules()}

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[names[module]] = args[0].clone()

    hooks = [layer.register_forward_pre_hook(watch) for layer in layers(model)]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", [1, 5])
def test_without_additions_the_reference_is_the_class_kept_model_bit_for_bit(
    batch: int, channels_last: bool
) -> None:
    kept, _ = static(Joined(), 2, 3, 17, 22)
    x = torch.randn(batch, 3, 20, 15)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        found, expected = integer_flow(kept, reference=True).model(x), kept(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_layers_are_given_the_codes_that_the_class_kept_model_rounds_to() -> None:
    kept, x = static(Joined(), 2, 3, 17, 22)
    found = given(integer_flow(kept, reference=True).model, x)
    expected: dict[str, Tensor] = {}

    def rounded(name: str, input: Tensor) -> None:
        activation = kept.get_submodule(name).activations()["weight"]  # type: ignore[operator]  # a quantized layer's method
        expected[name] = activation.scheme.quantize(input, activation.qparams(input)).codes

    hooks = [
        kept.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: rounded(name, args[0])
        )
        for name in found
        if name != "stem"  # it pads, and then rounds
    ]
    with torch.no_grad():
        kept(x)
    for hook in hooks:
        hook.remove()
    assert set(expected) == {"wide", "narrow", "last", "classifier"}
    for name, codes in expected.items():
        assert torch.equal(found[name], codes), name


def test_the_operators_give_codes_within_one_of_the_reference() -> None:
    kept, x = static(Joined(), 2, 3, 17, 22)
    exact = integer_flow(kept, reference=True).model
    found, expected = given(integer_flow(kept).model, x), given(exact, x)
    for name, codes in expected.items():
        apart = (found[name].int() - codes.int()).abs()
        assert int(apart.max()) <= 1, name
        assert float((apart > 0).float().mean()) < 1e-3, "only where a value lies on a half"


@pytest.mark.parametrize("reference", [False, True])
def test_a_residual_network_stays_as_near_to_float_as_the_class_kept_one(reference: bool) -> None:
    model = ResNet()
    kept, x = static(model, 4, 3, 64, 64)
    with torch.no_grad():
        exact = model(x)
        found, expected = integer_flow(kept, reference=reference).model(x), kept(x)
    assert sqnr_db(exact, found) > sqnr_db(exact, expected) - 2


def test_additions_are_done_by_the_convolution_before_them() -> None:
    flow = integer_flow(static(ResNet(), 2, 3, 64, 64)[0])
    assert "blocks.0.conv2: uint8 -> uint8, 'pool' added" in "\n".join(flow.lines)


def test_a_sum_of_codes_is_the_nearest_code_to_the_sum_of_their_values() -> None:
    ones, others, result = (0.031, 7, 255), (0.05, 130, 255), (0.04, 100, 200)
    one = torch.arange(256, dtype=torch.uint8)[:, None]
    other = torch.arange(256, dtype=torch.uint8)
    exact = (one.double() - 7) * 0.031 + (other.double() - 130) * 0.05
    codes = exact / 0.04 + 100
    found = add(one, other, ones, others, result)
    assert found.dtype == torch.uint8
    assert ((found.double() - codes.clamp(0, 200)).abs() <= 0.5 + 1e-4).all()
    assert (int(found.min()), int(found.max())) == (0, 200)


def test_padding_is_with_the_code_of_zero_and_inside_the_graph() -> None:
    model = nn.Sequential(Padding(3, 4, 3, 2), nn.ReLU(), Padding(4, 5, 3, 2))
    kept, _ = static(model, 1, 3, 9, 9)
    graph = integer_flow(kept, reference=True).model
    pads = [node for node in graph.graph.nodes if node.target is functional.pad]
    assert [pad.args[3] for pad in pads] == [layer.inputs.zero_point for layer in layers(graph)]
    for size in ((9, 9), (10, 7), (31, 32)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(graph(images), kept(images), rtol=0, atol=1e-6)


def test_what_is_not_understood_is_an_island_in_float_and_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.AvgPool2d(2))
    kept, x = static(model, 2, 3, 12, 12)
    flow = integer_flow(kept, reference=True)
    with torch.no_grad():
        assert torch.equal(flow.model(x), kept(x))
    assert flow.lines[1:3] == (
        "0: uint8 -> float32, as '1' takes floats; computed in float: it was asked for",
        "'1': float32, rounded to uint8 for '2'",
    )


def test_an_average_pool_between_layers_is_computed_in_float() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3))
    kept, x = static(model, 2, 3, 14, 14)
    with torch.no_grad():
        assert torch.equal(integer_flow(kept, reference=True).model(x), kept(x))


@needs_integers
@pytest.mark.parametrize("bits", [4, 8])
def test_grids_of_fewer_bits_and_weights_with_zero_points_flow_too(bits: int) -> None:
    quantizer = Quantizer().asymmetric().activations("static", bits=bits)
    data = [torch.randn(4, 8) for _ in range(3)]
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    kept = quantizer.only("*").fit(data).apply(model, progress=False).model
    flow = integer_flow(kept)
    assert not any("computed in float" in line for line in flow.lines)
    with torch.no_grad():
        found, expected = flow.model(data[0]), kept(data[0])
    step = kept.get_submodule("2").activations()["weight"].scale  # type: ignore[operator]  # a quantized layer's method
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=float(step))


def test_an_operator_keeps_to_a_grid_of_fewer_bits() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    data = [torch.randn(4, 8) for _ in range(3)]
    quantizer = Quantizer().activations("static", bits=4).only("*").fit(data)
    kept = quantizer.apply(model, progress=False).model
    codes = given(integer_flow(kept).model, 9 * data[0])["1"]
    assert (int(codes.min()), int(codes.max())) == (0, 15)


def test_an_average_takes_codes_that_a_layer_reads_too() -> None:
    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.one(x)
            return x.mean((2, 3)), self.two(x)

    kept, x = static(Averaging(), 2, 3, 12, 12)
    graph = integer_flow(kept, reference=True).model
    with torch.no_grad():
        (mean, rest), (expected, same) = graph(x), kept(x)
    assert torch.equal(rest, same)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.5 * layers(graph)[1].inputs.scale)


def test_an_empty_batch_gives_an_empty_one() -> None:
    kept, x = static(Joined(), 2, 3, 17, 22)
    graph = integer_flow(kept).model
    assert graph(x[:0]).shape == (0, *graph(x).shape[1:])


def test_an_input_that_asks_for_a_gradient_is_refused() -> None:
    kept, x = static(Joined(), 2, 3, 17, 22)
    with pytest.raises(InputError, match=r"call it under torch.no_grad\(\)"):
        integer_flow(kept).model(x.requires_grad_())


def test_an_image_without_a_batch_is_taken() -> None:
    kept, x = static(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), 2, 3, 9, 9)
    graph = integer_flow(kept).model
    with torch.no_grad():
        torch.testing.assert_close(graph(x[0]), graph(x)[0], rtol=0, atol=1e-6)


def test_a_layer_that_is_called_twice_gives_what_each_reader_takes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(self.layer(x).relu())
            return out

    kept, x = static(Twice(), 4, 6)
    flow = integer_flow(kept, reference=True)
    assert [line.split(":")[0] for line in flow.lines[1:]] == ["layer", "layer_2"]
    with torch.no_grad():
        assert torch.equal(flow.model(x), kept(x))


def test_a_single_layer_is_a_graph_too() -> None:
    data = [torch.randn(4, 6) for _ in range(3)]
    kept = Quantizer().only("*").fit(data).apply(nn.Linear(6, 3), progress=False).model
    with torch.no_grad():
        assert torch.equal(integer_flow(kept, reference=True).model(data[0]), kept(data[0]))


def test_arguments_with_a_default_keep_it() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor, mask: Tensor | None = None, double: bool = False) -> Tensor:
            out: Tensor = self.layer(x)
            if mask is not None:
                out = out * mask
            return out * 2 if double else out

    kept, x = static(Optional(), 4, 6)
    with torch.no_grad():
        assert torch.equal(integer_flow(kept, reference=True).model(x), kept(x))


# --- the graph as an object ---------------------------------------------------------------------


def test_the_result_is_a_graph_module_and_leaves_the_model_alone() -> None:
    kept, x = static(ResNet(), 2, 3, 64, 64)
    before = copy.deepcopy(kept.state_dict())
    names = [name for name, _ in kept.named_modules()]
    with torch.no_grad():
        expected = kept(x)
        graph = integer_flow(kept).model
        assert isinstance(graph, fx.GraphModule)
        assert torch.equal(kept(x), expected)
    assert [name for name, _ in kept.named_modules()] == names
    assert set(graph.state_dict()) == set(before)
    assert all(torch.equal(graph.state_dict()[name], value) for name, value in before.items())


def test_a_graph_can_be_copied_saved_and_loaded_after_it_ran() -> None:
    kept, x = static(Joined(), 2, 3, 17, 22)
    graph = integer_flow(kept).model
    with torch.no_grad():
        expected = graph(x)
        assert torch.equal(copy.deepcopy(graph)(x), expected)
        file = io.BytesIO()
        torch.save(graph, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), expected)
        state = copy.deepcopy(graph.state_dict())
        for name in state:
            if name.endswith("codes"):
                graph.get_buffer(name).add_(7)
        graph.load_state_dict(state)
        assert torch.equal(graph(x), expected)


# --- refusals -----------------------------------------------------------------------------------


def test_a_model_that_does_not_trace_is_refused_with_the_place() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            return out if out.sum() > 0 else -out

    kept, _ = static(nn.Sequential(nn.Linear(6, 6), Branching()), 4, 6)
    with pytest.raises(InputError, match=r"in '1' \(Branching\), line \d+ of test_flow.py: "):
        integer_flow(kept)


def test_a_tensor_that_is_changed_in_place_and_read_again_is_refused() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            functional.relu_(x)
            out: Tensor = self.two(x)
            return out

    kept, _ = static(Changing(), 4, 6)
    with pytest.raises(InputError, match="in place, which 'two' reads afterwards"):
        integer_flow(kept)


@pytest.mark.parametrize("mode", [None, "dynamic"])
def test_a_model_without_calibrated_inputs_is_refused(mode: str | None) -> None:
    kept = Quantizer().activations(mode).only("*").apply(nn.Linear(8, 8), progress=False).model
    with pytest.raises(InputError, match="no Linear or convolution of the model has calibrated"):
        integer_flow(kept)


def test_inputs_that_are_no_even_steps_are_named() -> None:
    quantizer = Quantizer().activations("static", dtype=torch.float8_e4m3fn).fit(torch.randn(4, 8))
    kept = quantizer.only("*").apply(nn.Linear(8, 8), progress=False).model
    with pytest.raises(InputError, match="its inputs are float8_e4m3fn per-tensor, not codes"):
        integer_flow(kept)


def test_a_model_of_half_precision_is_refused() -> None:
    kept, _ = static(nn.Sequential(nn.Linear(6, 6)), 4, 6)
    with pytest.raises(InputError, match=r"'0' is torch.bfloat16; call float\(\)"):
        integer_flow(kept.bfloat16())
