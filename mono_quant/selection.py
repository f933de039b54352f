"""Which layers a user means."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import attrs
from torch import nn
from torch.nn.parameter import is_lazy

from mono_quant.errors import ConfigurationError, InputError

Predicate = Callable[[str, nn.Module], bool]
Selector = str | type[nn.Module] | nn.Module | Predicate

_SHOWN = 3
"""Names that are told of a model in which a selector means nothing."""


def check_selector(selector: object) -> Selector:
    """Return `selector` if it is one.

    Raises:
        ConfigurationError: it is not a name, a module type, a module or a predicate.
    """
    if isinstance(selector, type):
        if issubclass(selector, nn.Module):
            return selector
    elif isinstance(selector, str | nn.Module) or callable(selector):
        return selector
    raise ConfigurationError(
        f"{selector!r} selects no layers: give a name (with * and ?), a module type, a module of "
        "the model, or a function of (name, module) that returns a bool"
    )


def matches_name(pattern: str, name: str) -> bool:
    """Return whether `pattern` matches a dotted name or one of its ancestors."""
    parts = name.split(".")
    names = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(one == pattern or fnmatchcase(one, pattern) for one in names)


@attrs.frozen(eq=False)
class Selection:
    """The modules and weights of one model by name, asked which of them a selector means.

    A name means the module of that name and all below it; so do a type and a module. ``*`` crosses
    dots. A name may also be that of one weight of a layer.
    """

    modules: Mapping[str, nn.Module]
    weights: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module) -> "Selection":
        """Return the selection for a model, with every name of a module that has several."""
        parameters = model.named_parameters(remove_duplicate=False)
        weights = frozenset(name for name, one in parameters if _is_weight(one))
        return cls(dict(model.named_modules(remove_duplicate=False)), weights)

    def roots(self, selector: Selector) -> list[str]:
        """Return the names of what `selector` itself means, modules in the model's order first.

        Raises:
            ConfigurationError: it means none, which is a slip of the pen.
        """
        roots = [
            name for name, module in self.modules.items() if self._is_root(selector, name, module)
        ]
        if isinstance(selector, str):
            weights = (name for name in self.weights if matches_name(selector, name))
            roots += sorted(name for name in weights if not _below(name, roots))
        if not roots:
            raise ConfigurationError(self._nothing(selector))
        return roots

    def names(self, selector: Selector) -> frozenset[str]:
        """Return the names of the modules that `selector` means and of all below them.

        And of weights that it means by their own names, and not by that of a module around them.
        """
        roots = self.roots(selector)
        below = (name for name in self.modules if _below(name, roots))
        return frozenset(roots).union(below)

    def _is_root(self, selector: Selector, name: str, module: nn.Module) -> bool:
        if isinstance(selector, str):
            return matches_name(selector, name) if name else selector in {"*", ""}
        if isinstance(selector, type):
            return isinstance(module, selector)
        if isinstance(selector, nn.Module):
            return module is selector
        answer = selector(name, module)
        if not isinstance(answer, bool):
            raise InputError(
                f"the predicate {selector!r} returned {answer!r} for {name!r}, not a bool"
            )
        return answer

    def _nothing(self, selector: Selector) -> str:
        if isinstance(selector, str):
            near = difflib.get_close_matches(selector, self.modules, n=3)
            names = [repr(name) for name in self.modules if name]
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            if names and not near:
                hint = f"; it has {', '.join(names[:_SHOWN])}{', ...' if names[_SHOWN:] else ''}"
            return f"{selector!r} matches no layer of the model{hint}"
        shown = selector.__name__ if isinstance(selector, type) else repr(selector)
        return f"{shown} matches no layer of the model"


def _is_weight(parameter: nn.Parameter) -> bool:
    lazy: bool = is_lazy(parameter)
    return not lazy and parameter.dim() > 1


def _below(name: str, roots: Iterable[str]) -> bool:
    return any(not root or name == root or name.startswith(f"{root}.") for root in roots)
