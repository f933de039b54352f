"""A model's graph from its own code, followed by symbolic tracing: no data runs."""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import attrs
import torch
from torch import fx, nn

from mono_quant.base import QuantizedModule
from mono_quant.transforms.aside import following, proxies, python_modules
from mono_quant.transforms.graph import IDLE, LAYERS, NORMS, Chain, Graph, Source, View
from mono_quant.transforms.nodes import activation_of, asks_only, flattens, idle, name_of
from mono_quant.transforms.reaching import reach

_VARIANTS = 8
"""Ways of calling a model that are tried beside the one by default."""

_SAME_SHAPE_LAYERS = (nn.Linear, *NORMS, *IDLE)


def trace(model: nn.Module, steps: frozenset[str] = frozenset()) -> Graph:
    """Return the graph of a model in eval mode, traced without data.

    A parameter of the model's forward that is None or a boolean by default is traced both ways, the
    other ways as far as they can be; other parameters with a default keep it. So is the answer to
    ``isinstance(x, Tensor)``, which a symbol cannot give. While a model is traced, torch replaces
    `nn.Module.__call__` for all threads.

    Args:
        model: the model.
        steps: dotted names of further modules that are taken as one step, as those of torch are.
            What their output reaches is looked into, as it is of layers.
    """
    if "forward" in vars(model):
        return Graph((), "its forward was replaced on the instance, so its class does not tell")
    try:
        views = [_view(model, _defaults(model), steps)]
    except Exception as error:  # whatever the model's own code raises on symbolic values
        first = str(error).strip().partition("\n")[0].partition(". ")[0]
        return Graph((), f"it cannot be traced ({type(error).__name__}: {first})")
    others = [(arguments, True) for arguments in _variants(model)]
    for arguments, tensors in (*others, (_defaults(model), False)):
        try:
            views.append(_view(model, arguments, steps, tensors=tensors))
        except Exception:
            continue  # not a way in which the model can be called, as far as tracing can tell
    return Graph(tuple(views))


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module is taken as one step, whatever its forward does inside."""
    torchs = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))
    own = isinstance(module, (*LAYERS, *NORMS, QuantizedModule, torch.jit.ScriptModule))
    return own or (torchs and not isinstance(module, nn.Sequential))


class _Tracer(fx.Tracer):
    def __init__(self, steps: frozenset[str]) -> None:
        super().__init__()
        self._steps = steps

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether `m` is one step of the graph."""
        return is_leaf(m) or module_qualified_name in self._steps


def _defaults(model: nn.Module) -> dict[str, object]:
    parameters = inspect.signature(model.forward).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _variants(model: nn.Module) -> Iterator[dict[str, object]]:
    """Yield other arguments, one changed at a time; one that is absent is given, symbolically."""
    defaults = _defaults(model)
    changed = [name for name, value in defaults.items() if value is None or isinstance(value, bool)]
    for name in changed[:_VARIANTS]:
        others = {key: value for key, value in defaults.items() if key != name}
        given = defaults[name]
        yield others if given is None else {**others, name: not given}


def _view(
    model: nn.Module,
    arguments: dict[str, object],
    steps: frozenset[str],
    *,
    tensors: bool = True,
) -> View:
    tracer = _Tracer(steps)
    with following(model, tensors=tensors):
        graph = tracer.trace(model, concrete_args=arguments)
        kept = {one.node for module in python_modules(model) for one in proxies(vars(module))}
    return _Reader(graph, dict(model.named_modules()), frozenset(kept), steps).view()


@attrs.frozen(eq=False)
class _Reader:
    """Reads one traced graph."""

    graph: fx.Graph
    modules: Mapping[str, nn.Module]
    kept: frozenset[fx.Node]
    steps: frozenset[str]

    def view(self) -> View:
        called = [node for node in self.graph.nodes if node.op == "call_module"]
        calls = Counter(str(node.target) for node in called)
        once = [node for node in called if calls[str(node.target)] == 1]
        return View(
            calls,
            {str(node.target): self._chain(node, calls) for node in once},
            {str(node.target): self._source(node) for node in once},
            {
                str(node.target): reach(node, self.graph.nodes, self.modules, calls, self.kept)
                for node in once
                if self._scalable(node)
            },
            frozenset(str(node.target) for node in once if self._is_matrix(node.all_input_nodes)),
            self._misused(calls),
        )

    def _scalable(self, node: fx.Node) -> bool:
        path = str(node.target)
        return path in self.steps or isinstance(self.modules[path], LAYERS)

    def _chain(self, node: fx.Node, calls: Mapping[str, int]) -> Chain:
        after, reason = self._next(node)
        found, path, dropout = None, None, False
        if after is not None and (found := activation_of(after, self.modules)) is not None:
            path = str(after.target) if after.op == "call_module" else None
            dropout = self._drops(node, after)
            after, reason = self._next(after)
        if after is None:
            return Chain(found, path, None, reason, dropout)
        target = str(after.target)
        if after.op != "call_module":
            return Chain(found, path, None, f"{name_of(after)} follows it", dropout)
        if calls[target] > 1:
            why = f"{target!r} is called {calls[target]} times"
            return Chain(found, path, None, why, dropout)
        if len(after.all_input_nodes) > 1:
            why = f"{target!r} takes more than its output"
            return Chain(found, path, None, why, dropout)
        return Chain(found, path, target, dropout=dropout)

    def _drops(self, node: fx.Node, end: fx.Node) -> bool:
        """Return whether more than an `nn.Identity` lies between a node and what follows it."""
        while end.all_input_nodes[0] is not node:
            end = end.all_input_nodes[0]
            if type(self.modules.get(str(end.target))) is not nn.Identity:
                return True
        return False

    def _next(self, node: fx.Node) -> tuple[fx.Node | None, str | None]:
        """Return the only user of a node's output, idle modules passed over, or why none."""
        while True:
            users = [user for user in node.users if not asks_only(user)]
            if node in self.kept:
                return None, "its output is kept as an attribute of a module"
            if not users:
                return None, "its output is not used"
            if len(users) > 1:
                return None, f"its output feeds {' and '.join(name_of(user) for user in users)}"
            if users[0].op == "output":
                return None, "its output is an output of the model"
            if not idle(users[0], self.modules):
                return users[0], None
            node = users[0]

    def _source(self, node: fx.Node) -> Source:
        while len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
            if not idle(node, self.modules):
                path = str(node.target) if node.op == "call_module" else None
                return Source(path, f"its input comes from {name_of(node)}")
        return Source(None, "it takes more than one input")

    def _is_matrix(self, inputs: Sequence[fx.Node]) -> bool:
        """Return whether an operation's input was flattened to two dimensions on its way."""
        while len(inputs) == 1:
            node = inputs[0]
            if flattens(node, self.modules):
                return True
            same = idle(node, self.modules) or activation_of(node, self.modules) is not None
            if node.op == "call_module":
                same = same or isinstance(self.modules[str(node.target)], _SAME_SHAPE_LAYERS)
            if not same:
                return False
            inputs = node.all_input_nodes
        return False

    def _misused(self, calls: Mapping[str, int]) -> Mapping[str, str]:
        """Return which modules' parameters serve others than the module's own call."""
        found: dict[str, str] = {}
        for node in self.graph.nodes:
            users = [user for user in node.users if not asks_only(user)]
            if node.op == "get_attr" and users:
                owner, _, name = str(node.target).rpartition(".")
                found[owner] = f"{name_of(users[0])} reads its {name}"
        names = {module: name for name, module in self.modules.items()}
        for path in calls:
            for inner in self.modules[path].modules():
                if inner is not self.modules[path]:
                    found[names[inner]] = f"it is inside {path!r}, which is not looked into"
        return found
