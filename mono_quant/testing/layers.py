"""Laws of layer quantizers, each on a layer of its kind."""

import copy
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn

from mono_quant import kernels
from mono_quant.api import load_model
from mono_quant.base import LayerQuantizer, QuantizedModule, Scheme
from mono_quant.errors import ConfigurationError
from mono_quant.numerics.nested import tensors_in
from mono_quant.quantizer import Quantizer
from mono_quant.result import QuantizationResult
from mono_quant.schemes import Affine, Codebook, FloatCast
from mono_quant.testing.law import Broken, DoesNotApply, Laws, Untouched, expect, same_bits

_SCHEMES: tuple[Scheme, ...] = (Affine(8), Affine(4, False), FloatCast(), Codebook.nf4())
_NEAR = 1e-4
"""How far a product in float32 may lie from the same one otherwise summed, of the largest."""

_HALVES = 2e-2
"""How far weights in half precision may move an output, of the largest."""


class Alone(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        """Hold a layer."""
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: object) -> object:
        """Call it."""
        output: object = self.layer(*inputs)
        return output


@attrs.frozen(eq=False)
class LayerCase:
    """A layer quantizer, and a layer to check it on.

    Attributes:
        quantizer: what is checked.
        make: makes a float layer that it `matches`.
        inputs: arguments of one call of the layer.
    """

    quantizer: LayerQuantizer
    make: Callable[[], nn.Module]
    inputs: tuple[object, ...]

    def __repr__(self) -> str:
        """Return the quantizer and the layer."""
        return f"{self.quantizer!r} on {' '.join(repr(self.layer()).split())}"

    def layer(self) -> nn.Module:
        """Return a float layer in eval mode, the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().eval()

    def quantizers(self) -> Iterator[Quantizer]:
        """Yield builders that quantize the layer's weights, with grids that it takes."""
        layer, able = self.layer(), 0
        shapes = [layout.stack for layout in self.quantizer.layouts(layer).values()]
        for scheme in _SCHEMES:
            fits = all(scheme.refuse(shape) is None for shape in shapes)
            if fits and self.quantizer.refuse(layer, scheme) is None:
                able += 1
                yield self._quantizer().scheme(scheme).activations(None)
        expect(able > 0, "it refuses every scheme that was tried on this layer")

    def halves(self) -> Quantizer:
        """Return a builder that casts the layer's weights to half precision."""
        if (reason := self.quantizer.refuse(self.layer(), FloatCast())) is not None:
            raise DoesNotApply(reason)
        return self._quantizer().bits(16)

    def call(self, layer: nn.Module) -> list[Tensor]:
        """Return the float tensors that a layer returns."""
        with torch.no_grad():
            output: object = layer(*self.inputs)
        return [x for x in tensors_in(output) if x.is_floating_point()]

    def result(self, quantizer: Quantizer, layer: nn.Module) -> QuantizationResult[Alone]:
        """Return what comes of a model that holds a layer alone."""
        result = quantizer.apply(Alone(layer), progress=False)
        left = "; ".join(f"{row.name}: {row.fate}" for row in result.report.layers)
        expect(isinstance(result.model.layer, QuantizedModule), f"it was left in float: {left}")
        return result

    def _quantizer(self) -> Quantizer:
        return Quantizer().only("*").layer(self.quantizer)


def it_matches_its_layer_and_no_other(case: LayerCase) -> None:
    """It matches the layer it is for, and neither a module of nothing nor a quantized layer."""
    quantizer = case.quantizer
    expect(quantizer.matches(case.layer()), f"it does not match a {type(case.layer()).__name__}")
    expect(not quantizer.matches(nn.Identity()), "it matches nn.Identity, which has no weight")
    made = case.result(next(case.quantizers()), case.layer()).model
    expect(
        not quantizer.matches(made.layer),
        "it matches the quantized layer, which would be quantized again",
    )


def layouts_lead_to_the_stack_and_back(case: LayerCase) -> None:
    """Every weight is a parameter, read as ``[G, out, in]`` and put back to the bit."""
    layer = case.layer()
    views = case.quantizer.weights(layer)
    expect(bool(views), "it names no weight")
    for name, view in views.items():
        expect(
            view.layout.native == tuple(view.native.shape),
            f"{name} is {tuple(view.native.shape)}, and its layout is of {view.layout.native}",
        )
        stack = view.layout.to_stack(view.native.detach())
        expect(stack.dim() == 3, f"{name} is read as {tuple(stack.shape)}, not [G, out, in]")
        back = view.layout.to_native(stack)
        expect(same_bits(back, view.native), f"{name} comes back otherwise")


def layouts_touch_no_tensor(case: LayerCase) -> None:
    """Layouts are known of a layer on the meta device, as plans of large models ask for them."""
    layer = case.layer()
    known = dict(case.quantizer.layouts(layer))
    found = dict(case.quantizer.layouts(layer.to("meta")))
    expect(found == known, f"on the meta device they are {found}")


def refusals_are_words(case: LayerCase) -> None:
    """`refuse` and its like return a reason or None, and never raise."""
    layer = case.layer()
    for name in case.quantizer.layouts(layer):
        reasons: list[object] = [case.quantizer.refuse(layer, scheme) for scheme in _SCHEMES]
        reasons.append(case.quantizer.discourage(layer, name))
        reasons += [case.quantizer.refuse_activation(layer, name, m) for m in ("dynamic", "static")]
        for reason in reasons:
            expect(reason is None or isinstance(reason, str), f"{reason!r} is no reason")


def the_source_layer_stays_float(case: LayerCase) -> None:
    """Quantizing changes a working copy: the given layer keeps class, weights and outputs."""
    for quantizer in case.quantizers():
        layer = case.layer()
        kind, before = type(layer), case.call(layer)
        given = Untouched(a_tensor_of_the_source=dict(layer.state_dict(keep_vars=True)))
        case.result(quantizer, layer)
        expect(type(layer) is kind, f"the source became a {type(layer).__name__}")
        given.expect()
        same = all(map(same_bits, case.call(layer), before))
        expect(same, "the source computes something else")


def it_computes_with_its_decoded_weights(case: LayerCase) -> None:
    """What stands in computes what the float layer does with the weights that it holds."""
    for quantizer in case.quantizers():
        made = case.result(quantizer, case.layer()).model.layer
        twin = case.layer()
        with torch.no_grad():
            for name, packed in _packed(made).items():
                twin.get_parameter(name).copy_(packed)
        _expect_twins(case, made, twin, "the float layer with its weights")


def in_half_precision_it_is_nearly_the_float_layer(case: LayerCase) -> None:
    """Cast to 16 bits, the layer's outputs are within a fiftieth of what they were."""
    made = case.result(case.halves(), case.layer()).model.layer
    expect_near(case.call(made), case.call(case.layer()), _HALVES, "the float layer")


def copies_and_pickles_are_the_same(case: LayerCase) -> None:
    """A deep copy, and what a pickle holds, have the same bits and compute the same."""
    for quantizer in case.quantizers():
        made = case.result(quantizer, case.layer()).model
        for how, other in (
            ("a copy", copy.deepcopy(made)),
            ("what a pickle holds", pickle.loads(pickle.dumps(made))),
        ):
            _expect_same_state(made, other, how)
            same = all(map(same_bits, case.call(made), case.call(other)))
            expect(same, f"{how} computes something else")


def it_is_dequantized_to_the_float_layer(case: LayerCase) -> None:
    """`dequantize` gives a layer of the float class, with the weights that were decoded."""
    for quantizer in case.quantizers():
        layer = case.layer()
        result = case.result(quantizer, layer)
        quantized = copy.deepcopy(result.model.layer)
        weights = _packed(quantized)
        floats = result.dequantize().layer
        expect(type(floats) is type(layer), f"it becomes a {type(floats).__name__}")
        names = {name for name, _ in layer.named_parameters()}
        found = {name for name, _ in floats.named_parameters()}
        expect(names == found, f"it has the parameters {sorted(found)}, not {sorted(names)}")
        for name, weight in weights.items():
            expect(same_bits(floats.get_parameter(name), weight), f"{name} is another weight")
        _expect_twins(case, quantized, floats, "what it is dequantized to")


def a_file_gives_it_back(case: LayerCase) -> None:
    """Saved and loaded into a layer on the meta device, it has the same bits and outputs."""
    for quantizer in case.quantizers():
        result = case.result(quantizer, case.layer())
        with tempfile.TemporaryDirectory() as folder:
            path = result.save(Path(folder) / "layer.safetensors")
            skeleton = Alone(case.layer()).to("meta")
            loaded = load_model(path, skeleton, layers=(case.quantizer,))
        _expect_same_state(result.model, loaded, "what was loaded")
        same = all(map(same_bits, case.call(loaded), case.call(result.model)))
        expect(same, "what was loaded computes something else")


def inputs_are_those_of_its_weights(case: LayerCase) -> None:
    """`inputs` names weights, and `rows` gives rows as long as those of the weight's matrices."""
    layer = case.layer()
    layouts = case.quantizer.layouts(layer)
    seen = list(case.quantizer.inputs(layer, case.inputs, {}))
    for name, x in seen:
        expect(name in layouts, f"inputs names {name}, which is no weight of layouts")
        rows = case.quantizer.rows(layer, name, x)
        if rows is not None:
            length = layouts[name].stack[2]
            expect(
                rows.shape[-1] == length,
                f"rows for {name} are {tuple(rows.shape)}, and those of its matrix have {length}",
            )
    taken = [
        name for name in layouts if case.quantizer.refuse_activation(layer, name, "static") is None
    ]
    silent = set(taken) - {name for name, _ in seen}
    expect(not silent, f"{', '.join(sorted(silent))} takes static inputs, which inputs never gives")


def quantized_inputs_survive_a_file(case: LayerCase) -> None:
    """Where it takes quantized inputs, a calibrated layer is saved, loaded and gives the same."""
    layer = case.layer()
    names = list(case.quantizer.layouts(layer))
    if all(case.quantizer.refuse_activation(layer, name, "static") for name in names):
        raise DoesNotApply("it refuses static inputs")
    try:
        quantizer = Quantizer().only("*").layer(case.quantizer).activations("static")
        result = case.result(quantizer.fit([case.inputs]), layer)
    except ConfigurationError as error:
        raise Broken(str(error)) from error
    found = result.validate()
    expect(bool(found), str(found))


def inputs_are_put_on_grids_as_when_quantized(case: LayerCase) -> None:
    """Within `quantizing_inputs`, the float layer computes what the quantized one does; then not.

    With the weights that were decoded, for static inputs and for dynamic ones.
    """
    layer, known = case.layer(), False
    inside = () if case.quantizer.takes_children else dict(layer.named_children())
    for mode in ("static", "dynamic"):
        names = case.quantizer.layouts(layer)
        if any(case.quantizer.refuse_activation(layer, name, mode) for name in names):
            continue
        quantizer = Quantizer().only("*").layer(case.quantizer).activations(mode, bits=4)
        quantizer = quantizer.skip(*(f"layer.{name}" for name in inside))
        made = case.result(quantizer.fit([case.inputs]), layer).model.layer
        twin = case.layer()
        with torch.no_grad():
            for name, packed in _packed(made).items():
                twin.get_parameter(name).copy_(packed)
        before, kind = case.call(twin), type(twin)
        assert isinstance(made, QuantizedModule)  # `result` saw to it
        context = case.quantizer.quantizing_inputs(twin, made.activations())
        if context is None:
            continue
        known = True
        with kernels.use("reference"), context:
            found, expected = case.call(twin), case.call(made)
        expect_near(found, expected, _NEAR, f"the layer with {mode} inputs")
        expect(type(twin) is kind, f"the layer is left a {type(twin).__name__}")
        same = all(map(same_bits, case.call(twin), before))
        expect(same, "the layer computes something else after the context")
    if not known:
        raise DoesNotApply("it takes no quantized inputs, or cannot put them on grids beforehand")


def _packed(layer: nn.Module) -> dict[str, Tensor]:
    """Return the decoded weights of a layer, and of those inside, by their dotted names."""
    return {
        f"{path}.{name}" if path else name: packed.dequantize()
        for path, inner in layer.named_modules()
        if isinstance(inner, QuantizedModule)
        for name, packed in inner.packed_weights().items()
    }


def _expect_same_state(one: nn.Module, other: nn.Module, what: str) -> None:
    first, second = one.state_dict(), other.state_dict()
    expect(list(first) == list(second), f"{what} has other tensors")
    for key, tensor in first.items():
        expect(same_bits(tensor, second[key]), f"{what} has another {key}")


def _expect_twins(case: LayerCase, made: nn.Module, floats: nn.Module, than: str) -> None:
    """Raise `Broken` unless a quantized layer is near a float one, by any kernel that it may have.

    By the reference but for what float32 rounds; the fastest may compute in 16 bits.
    """
    expected = case.call(floats)
    with kernels.use("reference"):
        expect_near(case.call(made), expected, _NEAR, than)
    expect_near(case.call(made), expected, _HALVES, f"{than}, by the fastest kernel")


def expect_near(found: list[Tensor], expected: list[Tensor], room: float, than: str) -> None:
    """Raise `Broken` unless outputs are near others, within a share of the largest."""
    expect(len(found) == len(expected), f"{len(found)} tensors come out, not {len(expected)}")
    for one, other in zip(found, expected, strict=True):
        expect(one.shape == other.shape, f"{tuple(one.shape)} comes out, not {tuple(other.shape)}")
        if one.numel():
            missed = float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
            expect(missed <= room, f"it is off by {missed:.2g} of the largest output of {than}")


LAWS = Laws(
    LayerCase,
    (
        it_matches_its_layer_and_no_other,
        layouts_lead_to_the_stack_and_back,
        layouts_touch_no_tensor,
        refusals_are_words,
        the_source_layer_stays_float,
        it_computes_with_its_decoded_weights,
        in_half_precision_it_is_nearly_the_float_layer,
        copies_and_pickles_are_the_same,
        it_is_dequantized_to_the_float_layer,
        a_file_gives_it_back,
        inputs_are_those_of_its_weights,
        quantized_inputs_survive_a_file,
        inputs_are_put_on_grids_as_when_quantized,
    ),
)
