"""Laws of what changes a model before or after it is quantized."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn

from mono_quant.api import load_model
from mono_quant.base import (
    WITHOUT_DATA,
    Change,
    Correction,
    CorrectionContext,
    Grid,
    Target,
    Transform,
    TransformContext,
)
from mono_quant.calibration import CalibrationData, compare
from mono_quant.checkpoint import copy_structure
from mono_quant.numerics.granularity import PerGroup
from mono_quant.numerics.nested import tensors_in
from mono_quant.observers import MinMax
from mono_quant.quantizer import Quantizer
from mono_quant.schemes import Affine
from mono_quant.testing.law import DoesNotApply, Laws, Untouched, expect, same_bits
from mono_quant.testing.models import Convolutions, Perceptron

_NEAR = 1e-4
"""How far an output may lie from the same one otherwise computed in float32, of the largest."""


@attrs.frozen(eq=False)
class TransformCase:
    """A transform, and what to check it on where that is not the small models here.

    Attributes:
        transform: what is checked.
        make: makes a float model.
        inputs: arguments of one call of the model.
        exact: whether it leaves the outputs of the float model as they were.
    """

    transform: Transform
    make: Callable[[], nn.Module] | None = None
    inputs: tuple[object, ...] = ()
    exact: bool = True

    def __repr__(self) -> str:
        """Return the transform."""
        return repr(self.transform)

    def models(self) -> Iterator[tuple[nn.Module, tuple[object, ...]]]:
        """Yield float models in eval mode, each with the arguments of a call."""
        return _models(self.make, self.inputs)


@attrs.frozen(eq=False)
class CorrectionCase:
    """A correction, and what to check it on where that is not the small models here.

    Attributes:
        transform: what is checked.
        make: makes a float model.
        inputs: arguments of one call of the model.
    """

    transform: Correction
    make: Callable[[], nn.Module] | None = None
    inputs: tuple[object, ...] = ()

    def __repr__(self) -> str:
        """Return the correction."""
        return repr(self.transform)

    def models(self) -> Iterator[tuple[nn.Module, tuple[object, ...]]]:
        """Yield float models in eval mode, each with the arguments of a call."""
        return _models(self.make, self.inputs)


def _models(
    make: Callable[[], nn.Module] | None, inputs: tuple[object, ...]
) -> Iterator[tuple[nn.Module, tuple[object, ...]]]:
    if make is None:
        for model in (Perceptron(), Convolutions()):
            yield model, (model.example(),)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = make().eval()
    yield made, inputs


def outputs_stay_what_they_were(case: TransformCase) -> None:
    """A float model computes the same after it, unless the case says that it is not exact."""
    transform = case.transform
    if not case.exact:
        raise DoesNotApply("the case says exact=False")
    for model, inputs in case.models():
        before = _call(model, inputs)
        changes = transform.apply(model, _context(model, inputs))
        missed = _missed(_call(model, inputs), before)
        done = [change.text for change in changes if change.done]
        expect(
            missed <= _NEAR,
            f"a {type(model).__name__} is off by {missed:.2g} of its largest output "
            f"after: {'; '.join(done) or 'nothing that it names'}",
        )


def old_tensors_are_not_written_into(case: TransformCase) -> None:
    """Parameters get new tensors: the source model shares the old ones and must not change."""
    transform = case.transform
    for model, inputs in case.models():
        working = copy_structure(model)
        given = Untouched(a_tensor_of_the_source=dict(model.state_dict(keep_vars=True)))
        transform.apply(working, _context(working, inputs))
        given.expect()


def changes_say_what_and_where(case: TransformCase) -> None:
    """It returns a `Change` for all that it did or refused, of a module that there is, in words."""
    transform = case.transform
    for model, inputs in case.models():
        known = {path for path, _ in model.named_modules()}
        before = {key: x.clone() for key, x in model.state_dict().items()}
        changes = transform.apply(model, _context(model, inputs))
        _expect_changes(changes, known)
        after = model.state_dict()
        same = list(before) == list(after) and all(
            before[key].shape == after[key].shape and torch.equal(before[key], after[key])
            for key in before
        )
        expect(
            same or any(change.done for change in changes),
            f"it changed a {type(model).__name__} and named no change",
        )


def without_data_it_works_or_says_so(case: TransformCase) -> None:
    """Unless it says `needs_data`, it also changes or refuses a model of which nothing is known."""
    transform = case.transform
    if transform.needs_data:
        raise DoesNotApply("it says needs_data")
    for model, _ in case.models():
        known = {path for path, _ in model.named_modules()}
        _expect_changes(transform.apply(model, WITHOUT_DATA), known)


def it_leaves_nothing_behind(case: TransformCase) -> None:
    """No hook stays on a module, and modes stay what they were."""
    transform = case.transform
    for model, inputs in case.models():
        transform.apply(model, _context(model, inputs))
        for path, module in model.named_modules():
            hooked = module._forward_hooks or module._forward_pre_hooks
            expect(not hooked, f"a hook stays on {path or 'the model'}")
            expect(not module.training, f"{path or 'the model'} is in training mode afterwards")


def a_model_changed_by_it_is_saved_and_loaded(case: TransformCase | CorrectionCase) -> None:
    """Its edits are enough to load a quantized model into a float one, with the same bits."""
    for (model, inputs), (fresh, _) in zip(case.models(), case.models(), strict=True):
        quantizer = Quantizer().bits(4).only("*").transform(case.transform).fit([inputs])
        result = quantizer.apply(model, progress=False)
        with tempfile.TemporaryDirectory() as folder:
            loaded = load_model(result.save(Path(folder) / "model.safetensors"), fresh)
        same = map(same_bits, _call(loaded, inputs), _call(result.model, inputs))
        expect(all(same), f"a {type(model).__name__} computes something else once it was loaded")


def a_correction_brings_the_outputs_nearer(case: CorrectionCase) -> None:
    """On the data, a corrected model errs no more than the same one uncorrected."""
    for model, inputs in case.models():
        plain = Quantizer().bits(4).only("*").fit([inputs])
        errors = []
        reference = [_call(model, inputs)]
        for quantizer in (plain, plain.transform(case.transform)):
            made = quantizer.apply(model, progress=False).model
            errors.append(compare(reference, [_call(made, inputs)]).sqnr_db)
        expect(
            errors[1] >= errors[0] - 0.05,
            f"a {type(model).__name__} is at {errors[1]:.2f} dB with it, {errors[0]:.2f} without",
        )


def a_correction_changes_only_the_quantized_model(case: CorrectionCase) -> None:
    """The float models that it compares with are read only."""
    for model, inputs in case.models():
        made = Quantizer().bits(4).only("*").apply(model, progress=False).model
        data = CalibrationData.bind([inputs])
        given = Untouched(a_float_model=dict(model.state_dict(keep_vars=True)))
        context = CorrectionContext(model, model, data.inner_outputs)
        known = {path for path, _ in made.named_modules()}
        _expect_changes(case.transform.apply(made, context), known)
        given.expect()


def _context(model: nn.Module, inputs: tuple[object, ...]) -> TransformContext:
    grid = Grid(Affine(4, False, PerGroup(16)), MinMax())
    targets = {
        name: Target(grid)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter[0].numel() % 16 == 0
    }
    return TransformContext(CalibrationData.bind([inputs]).outputs, targets)


def _expect_changes(changes: Sequence[Change], known: set[str]) -> None:
    for change in changes:
        expect(isinstance(change, Change), f"it returns {change!r}, which is no Change")
        expect(change.path in known, f"a change is of {change.path!r}, and there is no such module")
        expect(bool(change.text), f"a change of {change.path!r} has no words")


def _call(model: nn.Module, inputs: tuple[object, ...]) -> list[Tensor]:
    with torch.no_grad():
        output: object = model(*inputs)
    return [x for x in tensors_in(output) if x.is_floating_point()]


def _missed(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    expect([x.shape for x in found] == [x.shape for x in expected], "outputs have another shape")
    return max(
        float((x - y).abs().max() / y.abs().max().clamp(min=1e-30))
        for x, y in zip(found, expected, strict=True)
    )


LAWS = Laws(
    TransformCase,
    (
        outputs_stay_what_they_were,
        old_tensors_are_not_written_into,
        changes_say_what_and_where,
        without_data_it_works_or_says_so,
        it_leaves_nothing_behind,
        a_model_changed_by_it_is_saved_and_loaded,
    ),
)
CORRECTION_LAWS = Laws(
    CorrectionCase,
    (
        a_correction_brings_the_outputs_nearer,
        a_correction_changes_only_the_quantized_model,
        a_model_changed_by_it_is_saved_and_loaded,
    ),
)
