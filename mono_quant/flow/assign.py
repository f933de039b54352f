"""Which values of a graph are codes, and on which grid: decided from those who read them."""

from collections.abc import Mapping

import attrs
from torch import fx, nn

from mono_quant.errors import InputError
from mono_quant.flow.arithmetic import Grid
from mono_quant.flow.table import Step, mutates, step_of
from mono_quant.flow.tracer import PRODUCT, Traced
from mono_quant.operations import Convolution

_PRODUCT = Step("product")
_MANY = "those who read it have different grids"
_NONE = "no layer says on which grid it should be"


@attrs.frozen(eq=False)
class Assignment:
    """What is decided of the values of a graph.

    Attributes:
        steps: how each node treats codes, in the order of execution; what does nothing is gone.
        grids: of the nodes that give codes; the others give floats.
        reasons: why a node gives floats.
        sums: additions that the convolution before them computes, and that convolution.
    """

    steps: Mapping[fx.Node, Step]
    grids: Mapping[fx.Node, Grid]
    reasons: Mapping[fx.Node, str]
    sums: Mapping[fx.Node, fx.Node]


def assign(
    traced: Traced, modules: Mapping[str, nn.Module], inputs: Mapping[str, Grid]
) -> Assignment:
    """Return which values are codes.

    A value is codes on a grid if every layer that reads it, perhaps behind steps that commute with
    rounding, has that grid for its inputs, and nothing else needs its floats. So what a layer is
    given is what the model that keeps its class would round it to. Only additions and averages,
    which take codes as they come, then start from rounded values where that model does not.

    Args:
        traced: the graph.
        modules: of the model, by name.
        inputs: grids of the inputs of layers, by their names.

    Raises:
        InputError: a step changes a tensor in place that is read again later.
    """
    steps = checked_steps(traced, modules)
    grids: dict[fx.Node, Grid] = {}
    reasons: dict[fx.Node, str] = {}
    for node in reversed(steps):
        wanted: set[Grid | None] = set()
        for user in node.users:
            if user in traced.asserted or (node in steps[user].inputs and _is_free(steps[user])):
                continue
            grid = _grid_for(node, user, steps, grids, inputs)
            wanted.add(grid)
            if grid is None and node not in reasons:
                reasons[node] = _reason(node, user, steps, reasons)
        if len(wanted) == 1 and (only := wanted.pop()) is not None:
            if steps[node] is _PRODUCT or steps[node].commutes or steps[node].kind == "add":
                grids[node] = only
            continue
        reasons.setdefault(node, _MANY if wanted else _NONE)
    return Assignment(steps, grids, reasons, _sums(steps, grids))


def checked_steps(traced: Traced, modules: Mapping[str, nn.Module]) -> dict[fx.Node, Step]:
    """Return how each node treats codes, in the order of execution; take out what does nothing.

    Args:
        traced: the graph, which is changed.
        modules: of the model, by name.

    Raises:
        InputError: a step changes a tensor in place that is read again later.
    """
    for node in list(traced.graph.nodes):
        if (step := _step(node, modules)).kind == "idle":
            node.replace_all_uses_with(step.inputs[0])
            traced.graph.erase_node(node)
    steps = {node: _step(node, modules) for node in traced.graph.nodes}
    place = {node: index for index, node in enumerate(steps)}
    for node in steps:
        if steps[node] is not _PRODUCT:
            _check_in_place(node, modules, steps, place)
    return steps


def _step(node: fx.Node, modules: Mapping[str, nn.Module]) -> Step:
    return _PRODUCT if PRODUCT in node.meta else step_of(node, modules)


def _is_free(step: Step) -> bool:
    return step.tolerates or step.kind == "ask"


def _grid_for(
    node: fx.Node,
    user: fx.Node,
    steps: Mapping[fx.Node, Step],
    grids: Mapping[fx.Node, Grid],
    inputs: Mapping[str, Grid],
) -> Grid | None:
    if steps[user] is _PRODUCT:
        return inputs[str(user.target)]
    return grids.get(user) if node in steps[user].inputs and steps[user].commutes else None


def _reason(
    node: fx.Node, user: fx.Node, steps: Mapping[fx.Node, Step], reasons: Mapping[fx.Node, str]
) -> str:
    if steps[user].commutes and node in steps[user].inputs:
        return reasons[user]
    return f"{name_of(user)} takes floats"


def _sums(
    steps: Mapping[fx.Node, Step], grids: Mapping[fx.Node, Grid]
) -> Mapping[fx.Node, fx.Node]:
    """Return the additions whose one side is a convolution for it alone, and the other codes."""
    found: dict[fx.Node, fx.Node] = {}
    for node in steps:
        if steps[node].kind != "add" or node not in grids:
            continue
        one, other = steps[node].inputs
        for conv, codes in ((other, one), (one, other)):
            alone = list(conv.users) == [node] and conv is not codes
            if alone and isinstance(conv.meta.get(PRODUCT), Convolution) and codes in grids:
                found[node] = conv
                break
    return found


def _check_in_place(
    node: fx.Node,
    modules: Mapping[str, nn.Module],
    steps: Mapping[fx.Node, Step],
    place: Mapping[fx.Node, int],
) -> None:
    if not node.all_input_nodes or not mutates(node, modules):
        return
    changed = node.all_input_nodes[0]
    while True:
        readers = (user for user in changed.users if steps[user].kind != "ask")
        if later := [user for user in readers if place[user] > place[node]]:
            raise InputError(
                f"{name_of(node)} changes the output of {name_of(changed)} in place, which "
                f"{name_of(later[0])} reads afterwards; in a graph of codes it would not see the "
                "change: use the form that returns a new tensor"
            )
        if steps[changed].kind != "move":
            return
        changed = steps[changed].inputs[0]  # of which it may be a view


def name_of(node: fx.Node) -> str:
    """Return a node in words."""
    match node.op:
        case "call_module":
            return repr(str(node.target))
        case "output":
            return "the model's output"
        case "placeholder":
            return f"the model's input {node.target}"
        case "get_attr":
            return repr(str(node.target))
    if isinstance(node.target, str):
        return f"{node.target}()"
    return f"{getattr(node.target, '__name__', node.target)}()"
