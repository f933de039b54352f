"""Laws of containers, each on a module of its kind."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn

from mono_quant.api import load_model
from mono_quant.base import Container, QuantizedModule
from mono_quant.modules import SlowPathWarning
from mono_quant.numerics.nested import tensors_in
from mono_quant.quantizer import Quantizer
from mono_quant.result import QuantizationResult
from mono_quant.testing.law import DoesNotApply, Laws, expect, same_bits
from mono_quant.testing.layers import Alone, expect_near

_NEAR = 1e-4
"""How far an output in float32 may lie from the same one otherwise summed, of the largest."""


@attrs.frozen(eq=False)
class ContainerCase:
    """A container, and a module to check it on.

    Attributes:
        container: what is checked.
        make: makes a float module that it `matches`, with children that can be quantized.
        inputs: arguments of one call of the module.
    """

    container: Container
    make: Callable[[], nn.Module]
    inputs: tuple[object, ...]

    def __repr__(self) -> str:
        """Return the container and the module's class."""
        return f"{self.container!r} on {type(self.module()).__name__}"

    def module(self) -> nn.Module:
        """Return a float module in eval mode, the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().eval()

    def call(self, module: nn.Module) -> list[Tensor]:
        """Return the float tensors that a module returns, as it is called to serve."""
        with torch.no_grad():
            output: object = module(*self.inputs)
        return [x for x in tensors_in(output) if x.is_floating_point()]

    def quantized(self) -> QuantizationResult[Alone]:
        """Return a model that holds the module alone, all that can be quantized at 8 bits."""
        quantizer = Quantizer().activations(None).only("*").layer(self.container)
        return quantizer.apply(Alone(self.module()), progress=False)


def it_matches_its_module_and_no_other(case: ContainerCase) -> None:
    """It matches the module that it is for, and not one that reads nothing."""
    module = case.module()
    expect(case.container.matches(module), f"it does not match a {type(module).__name__}")
    expect(not case.container.matches(nn.Identity()), "it matches nn.Identity")


def refusals_are_words(case: ContainerCase) -> None:
    """`refuse_child` returns a reason or None for each child, and never raises."""
    module = case.module()
    for name, _ in module.named_children():
        reason: object = case.container.refuse_child(module, name)
        expect(reason is None or isinstance(reason, str), f"{reason!r} is no reason")


def quantized_children_are_called(case: ContainerCase) -> None:
    """What is quantized inside is called by its parent, or was refused: it is not only read."""
    model = case.quantized().model
    inside = {
        path: one for path, one in model.layer.named_modules() if isinstance(one, QuantizedModule)
    }
    if not inside:
        raise DoesNotApply("every child is refused")
    called: set[str] = set()
    for path, one in inside.items():
        one.register_forward_pre_hook(lambda *_, path=path: called.add(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)  # what is read instead is said below
        case.call(model)
    missed = ", ".join(path for path in inside if path not in called)
    expect(not missed, f"{missed} is quantized, and never called: refuse it, or adapt the module")


def adapting_changes_no_output(case: ContainerCase) -> None:
    """Adapted, a float module computes what it did; reverted, to the bit."""
    module = case.module()
    before = case.call(module)
    case.container.adapt(module)
    expect_near(case.call(module), before, _NEAR, "the module before it was adapted")
    case.container.revert(module)
    same = all(map(same_bits, case.call(module), before))
    expect(same, "once it is reverted it computes something else")


def dequantized_it_is_what_it_was(case: ContainerCase) -> None:
    """A dequantized model holds a module of the float class, which computes the same."""
    result = case.quantized()
    floats = result.dequantize()
    kind = type(case.module())
    expect(type(floats.layer) is kind, f"it becomes a {type(floats.layer).__name__}")
    expect_near(case.call(floats), case.call(result.model), _NEAR, "the quantized one")


def a_file_gives_it_back(case: ContainerCase) -> None:
    """Saved and loaded into a module on the meta device, it is adapted again and computes alike."""
    result = case.quantized()
    with tempfile.TemporaryDirectory() as folder:
        path = result.save(Path(folder) / "container.safetensors")
        skeleton = Alone(case.module()).to("meta")
        kinds = {case.container.kind: type(case.container)}
        loaded = load_model(path, skeleton, kinds=kinds)
    same = all(map(same_bits, case.call(loaded), case.call(result.model)))
    expect(same, "what was loaded computes something else")


LAWS = Laws(
    ContainerCase,
    (
        it_matches_its_module_and_no_other,
        refusals_are_words,
        quantized_children_are_called,
        adapting_changes_no_output,
        dequantized_it_is_what_it_was,
        a_file_gives_it_back,
    ),
)
