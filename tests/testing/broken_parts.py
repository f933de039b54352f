"""What is wrong in one way each: layers, files, transforms, kernels."""

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import (
    Activation,
    Change,
    Checkpoint,
    Container,
    Correction,
    CorrectionContext,
    KernelSpec,
    LayerQuantizer,
    Layout,
    PackedTensor,
    QuantizedModule,
    SafetensorsSerializer,
    Scheme,
    Serializer,
    Transform,
    TransformContext,
)
from mono_quant.base import WITHOUT_DATA
from mono_quant.configurable import Kinds
from mono_quant.errors import CorruptCheckpointError
from mono_quant.modules import QuantizedWeight
from mono_quant.testing import ContainerCase, LayerCase
from mono_quant.testing.models import noise

# --- layers --------------------------------------------------------------------------------------


class Doubling(nn.Module):
    """A layer of one's own: ``2 x @ weight.T + bias``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 64) / 8)
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(2 * x, self.weight, self.bias)


class QuantizedDoubling(QuantizedModule):
    def __init__(
        self,
        packed: PackedTensor,
        bias: nn.Parameter,
        fault: str,
        met: Mapping[str, Activation],
    ) -> None:
        super().__init__()
        self.holder, self.bias, self.fault, self.met = QuantizedWeight(packed), bias, fault, met
        if fault == "unpicklable":
            self.then: Callable[[Tensor], Tensor] = lambda y: y

    def packed_weights(self) -> Mapping[str, PackedTensor]:
        return {"weight": self.holder.packed}

    def activations(self) -> Mapping[str, Activation]:
        return self.met

    def dequantize(self) -> nn.Module:
        layer = Doubling() if self.fault != "another class" else nn.Linear(64, 16)
        layer.weight = nn.Parameter(self.holder.packed.dequantize())
        layer.bias = self.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.fault == "no bias" else self.bias
        given = self.met["weight"].fake_quantize(2 * x) if self.met else 2 * x
        return functional.linear(given, self.holder.packed.dequantize(), bias)


@attrs.frozen
class DoublingQuantizer(LayerQuantizer):
    kind: ClassVar[str] = "tests.doubling"
    fault: str = ""

    def matches(self, layer: nn.Module) -> bool:
        return self.fault == "matches all" or isinstance(layer, Doubling)

    def refuse(self, layer: nn.Module, scheme: Scheme) -> str | None:
        return False if self.fault == "no words" else None  # type: ignore[return-value]  # wrong

    def layouts(self, layer: nn.Module) -> Mapping[str, Layout]:
        weight = layer.get_parameter("weight")
        layout = Layout.grouped((16, 64))
        if self.fault == "reshapes":
            layout = Layout((16, 64), (64, 16), (1, 0), (1, 16, 64))
            layout = attrs.evolve(layout, native=(64, 16))
        if self.fault == "reads" and not weight.is_meta:
            layout = attrs.evolve(layout, stack=(1 if bool(weight.any()) else 2, 16, 64))
        if self.fault == "reads" and weight.is_meta:
            layout = attrs.evolve(layout, stack=(2, 8, 64))
        return {"weight": layout}

    def inputs(
        self, layer: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Iterator[tuple[str, Tensor]]:
        (x,) = args
        assert isinstance(x, Tensor)
        yield ("kernel" if self.fault == "misnames" else "weight"), x

    def rows(self, layer: nn.Module, name: str, x: Tensor) -> Tensor:
        return x.t() if self.fault == "columns" else x

    def refuse_activation(self, layer: nn.Module, name: str, mode: str) -> str | None:
        if self.fault in ("not on grids", "stays on grids") and mode == "static":
            return None
        return LayerQuantizer.refuse_activation(self, layer, name, mode)

    @contextmanager
    def quantizing_inputs(
        self, layer: nn.Module, activations: Mapping[str, Activation]
    ) -> Iterator[None]:
        one = activations["weight"]
        if self.fault == "stays on grids":  # halves and doubles are exact
            layer.register_forward_pre_hook(lambda _, args: one.fake_quantize(2 * args[0]) / 2)
        yield

    def replace(
        self,
        layer: nn.Module,
        weights: Mapping[str, PackedTensor],
        activations: Mapping[str, Activation],
    ) -> QuantizedModule:
        assert isinstance(layer, Doubling)
        bias = layer.bias
        if self.fault == "writes":
            bias.data.mul_(2)
        return QuantizedDoubling(weights["weight"], bias, self.fault, activations)


def doubling(fault: str) -> LayerCase:
    return LayerCase(DoublingQuantizer(fault), Doubling, (noise(5, 64),))


# --- files ---------------------------------------------------------------------------------------


class Pickling(Serializer):
    """The shortest format there is, and the most dangerous."""

    format = "pickling"
    suffixes = (".pickle",)

    def save(self, checkpoint: Checkpoint, path: Path) -> None:
        with path.open("wb") as file:
            pickle.dump(attrs.evolve(checkpoint, tensors=dict(checkpoint.tensors)), file)

    def load(self, path: Path, *, kinds: Kinds | None = None) -> Checkpoint:
        try:
            found: object = pickle.loads(path.read_bytes())
        except (pickle.UnpicklingError, EOFError) as error:
            raise CorruptCheckpointError(f"{path} is no pickle") from error
        if not isinstance(found, Checkpoint):
            raise CorruptCheckpointError(f"{path} holds no checkpoint")
        return found


class Untying(SafetensorsSerializer):
    def load(self, path: Path, *, kinds: Kinds | None = None) -> Checkpoint:
        return attrs.evolve(super().load(path, kinds=kinds), ties={})


class Stamped(SafetensorsSerializer):
    count: ClassVar[list[int]] = []

    def save(self, checkpoint: Checkpoint, path: Path) -> None:
        self.count.append(1)
        summary = {"saved": len(self.count)}
        super().save(attrs.evolve(checkpoint, summary=summary), path)


class Credulous(SafetensorsSerializer):
    """Reads what is left of a file as nothing."""

    def load(self, path: Path, *, kinds: Kinds | None = None) -> Checkpoint:
        try:
            return super().load(path, kinds=kinds)
        except CorruptCheckpointError:
            return Checkpoint({}, {})


class Scaling(SafetensorsSerializer):
    """Works in the memory of the model."""

    def save(self, checkpoint: Checkpoint, path: Path) -> None:
        for tensor in checkpoint.tensors.values():
            if tensor.is_floating_point():
                tensor.detach().mul_(2)
        super().save(checkpoint, path)


class Knowing(SafetensorsSerializer):
    """Knows every kind, whoever asks."""

    def load(self, path: Path, *, kinds: Kinds | None = None) -> Checkpoint:
        try:
            return super().load(path, kinds=kinds)
        except CorruptCheckpointError:
            raise
        except Exception:
            return Checkpoint({}, {}, config=json.loads("{}"))


class Picky(SafetensorsSerializer):
    def can_express(self, checkpoint: Checkpoint) -> str | None:
        return "it has ties" if checkpoint.ties else None

    def save(self, checkpoint: Checkpoint, path: Path) -> None:
        SafetensorsSerializer().save(checkpoint, path)


class Nameless(SafetensorsSerializer):
    suffixes = ("bin",)


# --- transforms ----------------------------------------------------------------------------------


@attrs.frozen
class Edits(Transform):
    """Does something to the first linear layer of a model."""

    kind: ClassVar[str] = "tests.edits"
    fault: str = ""

    def apply(self, model: nn.Module, context: TransformContext = WITHOUT_DATA) -> list[Change]:
        path, layer = next(
            (path, one) for path, one in model.named_modules() if isinstance(one, nn.Linear)
        )
        match self.fault:
            case "inexact" | "silent":
                layer.weight = nn.Parameter(layer.weight.detach() * 1.5)
            case "writes":
                layer.weight.data.mul_(1.0).add_(0.5)
            case "hooks":
                layer.register_forward_hook(lambda *_: None)
            case "nowhere":
                return [Change("no.such.layer", "it was changed")]
            case "needs":
                assert context.outputs is not None, "it cannot do without data"
            case "structure":
                layer.register_parameter("extra", nn.Parameter(torch.ones(3)))
        if self.fault == "silent":
            return []
        return [Change(path, f"{path} was looked at")]


@attrs.frozen
class Spoiling(Correction):
    kind: ClassVar[str] = "tests.spoiling"
    fault: str = "worse"

    def apply(self, model: nn.Module, context: CorrectionContext) -> list[Change]:
        target = context.floats if self.fault == "writes" else model
        path, bias = next(
            (path, one._parameters["bias"])
            for path, one in target.named_modules()
            if one._parameters.get("bias") is not None
        )
        assert bias is not None
        with torch.no_grad():
            bias.add_(1)
        return [Change(path, f"the bias of {path} was moved")]


# --- kernels -------------------------------------------------------------------------------------


@attrs.frozen
class Product:
    """A kernel for matrix products of float inputs, with one fault."""

    fault: str = ""

    @property
    def name(self) -> str:
        return f"product: {self.fault or 'no fault'}"

    def supports(self, spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
        if self.fault == "no words":
            return False  # type: ignore[return-value]  # that is what is wrong
        return "inputs are quantized" if spec.activation is not None else None

    def __call__(
        self, spec: KernelSpec, x: Tensor, weight: PackedTensor, bias: Tensor | None
    ) -> Tensor:
        values = weight.dequantize(torch.float32)
        if self.fault == "writes":
            x.mul_(1.5)
        if self.fault == "drops":
            values = values.to(torch.float8_e4m3fn).to(torch.float32)
        found = x.to(torch.float32) @ values.T
        found = found if bias is None or self.fault == "no bias" else found + bias
        if self.fault == "flat":
            found = found.flatten(0, -2)
        return found if self.fault == "wide" else found.to(x.dtype)


# --- containers --------------------------------------------------------------------------------


class Scorer(nn.Module):
    """Reads the weight of one child, and calls the other where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes = nn.Linear(64, 64), nn.Linear(64, 32)
        self.quick = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.linear(x, self.body.weight) if self.quick else self.body(x)
        return hidden @ self.classes.weight.T


@attrs.frozen
class ScorerContainer(Container):
    kind: ClassVar[str] = "tests.scorer"
    fault: str = ""

    def matches(self, module: nn.Module) -> bool:
        return self.fault == "matches all" or isinstance(module, Scorer)

    def refuse_child(self, module: nn.Module, name: str) -> str | None:
        if self.fault == "no words":
            return False  # type: ignore[return-value]  # that is what is wrong
        if self.fault == "reads":
            return None
        return "Scorer reads this weight by attribute"

    def adapt(self, module: nn.Module) -> None:
        if self.fault == "adapts otherwise" and isinstance(module, Scorer):
            module.quick = False  # which adds the bias

    def revert(self, module: nn.Module) -> None:
        pass


def scorer(fault: str) -> ContainerCase:
    return ContainerCase(ScorerContainer(fault), Scorer, (noise(5, 64),))
