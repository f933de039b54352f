"""Between a quantized model and its checkpoint, and back into a float skeleton."""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import attrs
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from mono_quant.base import (
    Activation,
    Checkpoint,
    Container,
    LayerQuantizer,
    PackedTensor,
    QuantizedModule,
    WeightRecord,
)
from mono_quant.configurable import Config, Configurable, Kinds, kinds_of
from mono_quant.devices import devices_of, move
from mono_quant.errors import (
    CheckpointError,
    ConfigurationError,
    CorruptCheckpointError,
    InputError,
    Mend,
    UnknownKindError,
    UnsupportedLayerError,
)
from mono_quant.layers import BUILT_IN_LAYERS
from mono_quant.modules import QuantizedInput, QuantizedLayer, QuantizedWeight, tie
from mono_quant.transforms.activation import computes_in_place
from mono_quant.transforms.edits import edits_of, put, repeat
from mono_quant.transforms.nodes import hooked
from mono_quant.transforms.rescaling import watched

ModelT = TypeVar("ModelT", bound=nn.Module)

_FOREIGN_SAVE = "save_pretrained"
_ADAPTED_BY = "_adapted_by"  # where an adapted container keeps the `Container` that did it


def copy_structure(model: ModelT, device: torch.device | None = None) -> ModelT:
    """Return a copy of a model whose parameters share the storage of the original's.

    Every module is a new object, every parameter a new `nn.Parameter` on the old storage (one for
    each tie), every tensor of a quantized weight a new one on the old storage, every other buffer a
    clone: what is done to the copy (dtype, train mode, buffers) leaves the original alone, and no
    weight is copied. With a device (meta), tensors are empty ones there.

    Raises:
        InputError: the model cannot be copied.
    """
    for path, module in model.named_modules():
        if inspect.isfunction(vars(module).get("forward")):
            raise InputError(
                f"the forward of {path or 'the model'} was replaced on the object by a function, "
                "which a copy would share with the source; make it a method of its class, or "
                "quantize the model in place with apply_"
            )
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        data = parameter.detach()
        if device is not None:
            data = torch.empty_like(data, device=device)
        memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    for module in model.modules():
        if isinstance(module, QuantizedWeight | QuantizedInput):
            memo |= {id(buffer): buffer.detach() for buffer in module.buffers()}
    for buffer in model.buffers():
        if device is not None:
            memo[id(buffer)] = torch.empty_like(buffer, device=device)
        elif buffer.layout != torch.strided:  # deepcopy fails on some of the sparse ones
            memo[id(buffer)] = buffer.clone()
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # a hook makes it at each call
                memo[id(value)] = value.detach().to(device, copy=True)
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied ({error}); quantize it in place with apply_"
        ) from error


def to_checkpoint(
    model: nn.Module, config: Config | None = None, summary: Config | None = None
) -> Checkpoint:
    """Return a quantized model as plain data that shares its memory.

    Raises:
        CheckpointError: the model keeps something that is not a tensor in its state dict, a tensor
            is sparse, or a layer does not say what made it.
    """
    records: dict[str, WeightRecord] = {}
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first_names: dict[int, str] = {}
    transient: set[str] = set()
    packed_ids: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, QuantizedModule):
            continue
        for name, packed in module.packed_weights().items():
            maker, activation = _maker(path, module).to_config(), module.activations().get(name)
            record = WeightRecord(path, name, packed, maker, activation)
            records[record.key] = record
            packed_ids.update(id(tensor) for tensor in packed.tensors.values())
            first = first_names.setdefault(id(packed.tensors["codes"]), record.key)
            if first != record.key:
                ties[record.key] = first
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedWeight | QuantizedInput):
            continue
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"{path or 'the model'} keeps extra state beside its tensors, which files here "
                "cannot hold; save it yourself and load it with set_extra_state"
            )
        for name, tensor in _own_tensors(module):
            if id(tensor) in packed_ids:
                continue
            key = f"{path}.{name}" if path else name
            if tensor.layout != torch.strided:
                raise CheckpointError(
                    f"{key} is stored as {tensor.layout}, which files here cannot hold; make it "
                    "dense, with to_dense(), before quantizing"
                )
            tensors[key] = tensor
            if name in module._non_persistent_buffers_set:
                transient.add(key)
            first = first_names.setdefault(id(tensor), key)
            if first != key:
                ties[key] = first
    adapted = {container: None for module in model.modules() for container in _adapted_by(module)}
    return Checkpoint(
        records,
        tensors,
        frozenset(transient),
        ties,
        tuple(container.to_config() for container in adapted),
        tuple(edit.to_config() for edit in edits_of(model)),
        _applied(model),
        config or {},
        summary or {},
    )


def kinds_in(model: nn.Module) -> Kinds:
    """Return the classes that a quantized model's file will name, by their kind."""
    found: list[Configurable] = []
    for module in model.modules():
        found += _adapted_by(module)
        if isinstance(module, QuantizedModule):
            found += [packed.scheme for packed in module.packed_weights().values()]
            found += [activation.scheme for activation in module.activations().values()]
            found += [module.made_by] if module.made_by is not None else []
    return kinds_of(*found)


def rebuild(
    skeleton: ModelT,
    checkpoint: Checkpoint,
    *,
    layers: Iterable[LayerQuantizer] = (),
    containers: Iterable[Container] = (),
    kinds: Kinds | None = None,
) -> ModelT:
    """Turn a float skeleton into the quantized model of a checkpoint, in place, and return it.

    The skeleton may be on the meta device. All names and shapes are checked before a layer is
    changed. Tensors are taken over, not copied, unless the skeleton lies on another device: then
    they are moved there.

    Raises:
        CheckpointError: names or shapes do not fit.
        UnsupportedLayerError: no layer quantizer knows a layer.
    """
    devices = devices_of(skeleton)
    repeat(skeleton, checkpoint.edits)
    makers = _makers(skeleton, checkpoint, (*layers, *BUILT_IN_LAYERS), kinds)
    _check_fit(skeleton, checkpoint)
    _check_applied(skeleton, checkpoint)
    with _described():
        recorded = [Container.from_config(config, kinds) for config in checkpoint.containers]
    replaced: dict[str, nn.Module] = {}
    for path, found in makers.items():
        layer = skeleton.get_submodule(path)
        if isinstance(layer, QuantizedModule):
            first = next(name for name, module in replaced.items() if module is layer)
            for name in found.weights:
                if not _tied(checkpoint, f"{path}.{name}", f"{first}.{name}"):
                    raise CheckpointError(
                        f"{path!r} and {first!r} are one module in the model and two in the file"
                    )
            replaced[path] = layer
            continue
        module = found.maker.replace(layer, found.weights, found.activations)
        module.made_by = found.maker
        skeleton = put(skeleton, layer, module)
        replaced[path] = module
    for alias, first in checkpoint.ties.items():
        if alias in checkpoint.records:
            one, other = checkpoint.records[first], checkpoint.records[alias]
            tie(replaced[one.module], one.name, replaced[other.module], other.name)
    _fill(skeleton, checkpoint)
    _apply(skeleton, checkpoint, replaced)
    adapt_containers(skeleton, (*recorded, *containers))
    guard_saving(skeleton)
    move(skeleton, devices)
    return skeleton


def _tied(checkpoint: Checkpoint, one: str, other: str) -> bool:
    return checkpoint.ties.get(one, one) == checkpoint.ties.get(other, other)


def adapt_containers(model: nn.Module, containers: Iterable[Container]) -> None:
    """Adapt every container that has quantized descendants, by the first that matches."""
    known = tuple(containers)
    for module in model.modules():
        container = next((one for one in known if one.matches(module)), None)
        if container is not None and _holds_quantized(module):
            container.adapt(module)
            module.__dict__[_ADAPTED_BY] = container


def _holds_quantized(module: nn.Module) -> bool:
    return any(isinstance(child, QuantizedModule) for child in module.modules())


def guard_saving(model: nn.Module) -> None:
    """Have ``save_pretrained`` refuse quantized modules, of whatever library it comes from.

    It would write their state dict, and ``from_pretrained`` of transformers and its relatives draws
    weights at random where it finds none by their names. The attribute of the object hides the
    method of its class, which stays what it is.
    """
    for module in model.modules():
        saves = callable(getattr(type(module), _FOREIGN_SAVE, None))
        if saves and _holds_quantized(module):
            module.__dict__[_FOREIGN_SAVE] = refuse_to_save


def refuse_to_save(*_: object, **__: object) -> NoReturn:
    """Stand where a quantized model's ``save_pretrained`` was.

    Raises:
        CheckpointError: always; says what saves the model.
    """
    raise CheckpointError(
        "the model is quantized, and of what save_pretrained writes of it, from_pretrained draws "
        "the weights at random: save it with result.save(path) or save_model(model, path), and its "
        "configuration with model.config.save_pretrained(folder); a save_pretrained that knows "
        "better is back after del model.save_pretrained"
    )


@contextmanager
def calling(
    model: nn.Module, containers: Iterable[Container], paths: Iterable[str]
) -> Iterator[None]:
    """Have the containers of some float layers call them, as if those were quantized already.

    A hook on a layer that its parent only reads would otherwise never see an input.
    """
    known = tuple(containers)
    layers = {model.get_submodule(path) for path in paths}
    adapted: list[tuple[Container, nn.Module]] = []
    try:
        for module in model.modules():
            container = next((one for one in known if one.matches(module)), None)
            below = not layers.isdisjoint(module.modules())
            if container is not None and below and not _adapted_by(module):
                adapted.append((container, module))
                container.adapt(module)
        yield
    finally:
        for container, module in adapted:
            container.revert(module)


def dequantized(model: ModelT) -> ModelT:
    """Turn every quantized layer of a model back into a float one, in place; return the model."""
    floats: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        if not isinstance(module, QuantizedModule):
            continue
        keys = {
            name: id(packed.tensors["codes"]) for name, packed in module.packed_weights().items()
        }
        layer = module.dequantize()
        model = put(model, module, layer)
        for name, key in keys.items():
            parameter = layer.get_parameter(name)
            layer.register_parameter(name, floats.setdefault(key, parameter))
    for module in model.modules():
        for container in _adapted_by(module):
            container.revert(module)
            del module.__dict__[_ADAPTED_BY]
        if module.__dict__.get(_FOREIGN_SAVE) is refuse_to_save:
            del module.__dict__[_FOREIGN_SAVE]
    return model


_SHARDING = "torch.distributed.fsdp.fully_sharded_data_parallel"
_FLATTENED = "_fsdp_flattened"
"""What that sets on parameters that it keeps in one flat memory."""
_GATHER = "gather the model first, with full_tensor() or a full state dict, into a plain one"


def check_supported(model: nn.Module) -> None:
    """Refuse models whose parameters cannot be read.

    Raises:
        InputError: naming what is wrong and the call that mends it.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("a ScriptModule cannot be quantized; give the module it was made from")
    if hasattr(model, "_orig_mod"):
        raise InputError("the model is compiled; quantize model._orig_mod and compile the result")
    for path, module in model.named_modules():
        if any(base.__module__ == _SHARDING for base in type(module).__mro__):
            raise InputError(
                f"{path or 'the model'} is a {type(module).__name__}, of whose weights each "
                f"process holds a part; {_GATHER}"
            )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):  # asked first: a lazy one cannot be asked anything else
            raise InputError(
                f"{name} is lazy and has no values yet; run the model once on an example first"
            )
        if type(parameter).__module__.startswith("torch.distributed"):
            raise InputError(
                f"{name} is a {type(parameter).__name__}, of which each process holds a part; "
                f"{_GATHER}"
            )
        if parameter.__dict__.get(_FLATTENED):
            raise InputError(
                f"{name} lies in the memory of a FullyShardedDataParallel, of which each process "
                f"holds a part; {_GATHER}"
            )
        if parameter.is_inference():
            raise InputError(
                f"{name} was made under torch.inference_mode(), where nothing can be changed; "
                "make or load the model outside of it"
            )
        if parameter.layout != torch.strided:
            raise InputError(
                f"{name} is stored as {parameter.layout}; make it dense, with to_dense(), first"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not is_lazy(tensor) and tensor.is_meta:
            raise InputError(f"{name} is on the meta device and has no values; load them first")


def check_quantized(model: nn.Module) -> None:
    """Refuse a model without a quantized layer.

    Raises:
        InputError: there is none.
    """
    if not _holds_quantized(model):
        if isinstance(model, fx.GraphModule):
            raise InputError(
                "a graph has no quantized layers of its own; use the model that it was written "
                "from, result.kept.model, and write it anew with integer_flow(...)"
            )
        raise InputError(
            f"{type(model).__name__} has no quantized layer; quantize(model) makes them, and its "
            "report says why one stays float"
        )


def _maker(path: str, module: QuantizedModule) -> LayerQuantizer:
    if module.made_by is None:
        raise CheckpointError(f"{path} does not say which LayerQuantizer made it; set made_by")
    return module.made_by


def _adapted_by(module: nn.Module) -> tuple[Container, ...]:
    container = module.__dict__.get(_ADAPTED_BY)
    return (container,) if isinstance(container, Container) else ()


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


@attrs.frozen(eq=False)
class _Replacement:
    """What stands in for one layer."""

    maker: LayerQuantizer
    weights: dict[str, PackedTensor] = attrs.field(factory=dict)
    activations: dict[str, Activation] = attrs.field(factory=dict)

    def add(self, record: WeightRecord) -> None:
        self.weights[record.name] = record.weight
        if record.activation is not None:
            self.activations[record.name] = record.activation


@contextmanager
def _described() -> Iterator[None]:
    """Have it said of a file that it describes something that cannot be."""
    try:
        yield
    except ConfigurationError as error:
        raise CorruptCheckpointError(f"the file describes what cannot be made: {error}") from error


def _makers(
    skeleton: nn.Module,
    checkpoint: Checkpoint,
    known: tuple[LayerQuantizer, ...],
    kinds: Kinds | None,
) -> Mapping[str, _Replacement]:
    """Return what replaces each layer, and by which weights; the recorded kind is asked first."""
    makers: dict[str, _Replacement] = {}
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    for key, record in checkpoint.records.items():
        layer = modules.get(record.module)
        if layer is None:
            raise CheckpointError(f"the file has {key!r}, and the model has no {record.module!r}")
        if isinstance(layer, QuantizedModule):
            raise CheckpointError(f"{record.module!r} is quantized already; give a float skeleton")
        if record.module in makers:
            makers[record.module].add(record)
            continue
        try:
            with _described():
                recorded = [LayerQuantizer.from_config(record.layer, kinds)]
        except UnknownKindError:
            recorded = []
        maker = next((one for one in (*recorded, *known) if one.matches(layer)), None)
        if maker is None:
            raise UnsupportedLayerError(
                f"no LayerQuantizer knows {record.module!r}, a {type(layer).__name__} "
                f"(the file says kind {record.layer.get('kind')!r})",
                Mend.LAYER,
            )
        makers[record.module] = _Replacement(maker)
        makers[record.module].add(record)
    for path, found in makers.items():
        layouts = found.maker.layouts(modules[path])
        for name, packed in found.weights.items():
            native = layouts[name].native if name in layouts else None
            if native != packed.layout.native:
                raise CheckpointError(
                    f"{path}.{name} is {packed.layout.native} in the file and {native} in the model"
                )
    return makers


def _check_fit(skeleton: nn.Module, checkpoint: Checkpoint) -> None:
    expected: dict[str, Tensor] = {}
    quantized = {record.module for record in checkpoint.records.values()}
    for path, module in skeleton.named_modules(remove_duplicate=False):
        parametrized = path.endswith(".parametrizations") or ".parametrizations." in path
        if parametrized and path.split(".parametrizations")[0] in quantized:
            continue
        for name, tensor in _own_tensors(module):
            expected[f"{path}.{name}" if path else name] = tensor
    present = {*checkpoint.tensors, *checkpoint.records}
    if missing := sorted(set(expected) - present):
        raise CheckpointError(f"the model has {_few(missing)}, which the file lacks")
    if extra := sorted(set(checkpoint.tensors) - set(expected) - checkpoint.transient):
        raise CheckpointError(f"the file has {_few(extra)}, which the model lacks")
    for key, tensor in checkpoint.tensors.items():
        if key not in expected:
            continue  # a transient buffer that the forward makes anew
        old = expected[key]
        parameter = isinstance(old, nn.Parameter) and old.is_floating_point()
        if parameter and not tensor.is_floating_point():
            raise CheckpointError(
                f"{key} is {tensor.dtype} in the file and {old.dtype} in the model"
            )
        if not is_lazy(expected[key]) and expected[key].shape != tensor.shape:
            raise CheckpointError(
                f"{key} is {tuple(tensor.shape)} in the file and "
                f"{tuple(expected[key].shape)} in the model"
            )


def _applied(model: nn.Module) -> Mapping[str, str]:
    """Return which layer computes which activation, by the names that both have now."""
    names = {id(module): path for path, module in model.named_modules()}
    found: dict[str, str] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedModule) and layer.stand_in is not None:
            if id(layer.stand_in) not in names:
                raise CheckpointError(
                    f"{path!r} computes an activation whose place is no longer in the model, so a "
                    "file cannot say which; put the nn.Identity that stood there back, or call "
                    "give_back() on the layer"
                )
            found[names[id(layer.stand_in)]] = path
    return found


def _check_applied(skeleton: nn.Module, checkpoint: Checkpoint) -> None:
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    quantized = {record.module for record in checkpoint.records.values()}
    several = len(checkpoint.applied)
    places = {id(modules[path]) for path in checkpoint.applied if path in modules}
    if several > min(len(places), len(set(checkpoint.applied.values()))):
        raise CheckpointError(
            "the file has layers compute activations that are not one for each in the model"
        )
    for path, layer in checkpoint.applied.items():
        module = modules.get(path) if path else None
        if module is None or not computes_in_place(module):
            raise CheckpointError(
                f"the file has a layer compute {path!r:.80}, an activation, and that is a "
                f"{type(module).__name__} in the model"
            )
        if layer not in quantized:
            raise CheckpointError(f"the file has {layer!r:.80} compute {path!r}, and not quantized")


def _apply(skeleton: nn.Module, checkpoint: Checkpoint, replaced: Mapping[str, nn.Module]) -> None:
    """Let layers compute the activations that they computed when they were saved.

    Where a hook of the skeleton sees one of both, they stay apart: the values are the same.
    """
    for path, name in checkpoint.applied.items():
        layer, activation = replaced[name], skeleton.get_submodule(path)
        if watched(skeleton, name, path) is not None or hooked(activation):
            continue
        if not isinstance(layer, QuantizedLayer) or (why := layer.refuse_then()) is not None:
            known = why if isinstance(layer, QuantizedLayer) else f"a {type(layer).__name__}"
            raise CheckpointError(f"{name!r} cannot compute {path!r}: {known}")
        put(skeleton, activation, layer.take_over(activation))


def _fill(skeleton: nn.Module, checkpoint: Checkpoint) -> None:
    parameters: dict[int, nn.Parameter] = {}
    for path, module in skeleton.named_modules(remove_duplicate=False):
        for name, old in list(_own_tensors(module)):
            tensor = checkpoint.tensors.get(f"{path}.{name}" if path else name)
            if tensor is None:
                continue
            if isinstance(old, nn.Parameter):
                fresh = nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
                module._parameters[name] = parameters.setdefault(id(tensor), fresh)
            else:
                module._buffers[name] = tensor


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
