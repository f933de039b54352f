"""Who may import whom: every import of the package, read from its source."""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import pytest

import mono_quant

ROOT = Path(mono_quant.__file__).parent
PACKAGE = ROOT.name

RANKS = {
    name: rank
    for rank, names in enumerate(
        [
            "version errors progress text atomic devices",
            "configurable",
            "numerics",
            "base speed",
            "learning",
            "batches evidence operations recurrence schemes observers rounding selection "
            "transforms",
            "kernels settings columns",
            "modules pictures difference",
            "layers serializers report",
            "calibration checkpoint gathering stored",
            "benchmark statistics",
            "result flow",
            "plan files",
            "builder comparison",
            "quantizer",
            "api",
            "demo testing",
            "cli",
            "__main__",
        ]
    )
    for name in names.split()
}
"""A module imports only from lower ranks; of the package's own __init__ nothing is asked."""

ONLY_IN = {
    "safetensors": "serializers",
    "argparse": "cli",
    "torch.ops": "kernels",
    "tqdm": "progress",
}
"""What only these packages may touch."""
LAZY = {"demo", "testing", "report", "pictures"}
"""Parts that may import inside functions: what they need is optional, or seldom needed."""
DEPENDENCIES = {"torch", "safetensors", "attrs", "tqdm"}


@attrs.frozen
class Import:
    """One module that a file imports, or an attribute of a module that it names."""

    line: int
    target: str
    inside: bool = False


@attrs.frozen
class Source:
    """A file of the package.

    Attributes:
        path: where it is, from the repository's root on.
        module: its dotted name.
        tree: what it says.
    """

    path: str
    module: str
    tree: ast.Module

    @property
    def part(self) -> str:
        """The module or package directly below the root that the file belongs to."""
        return part_of(self.module)

    def imports(self) -> Iterator[Import]:
        """Yield every import, wherever it stands."""
        for node, inside in walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(node.lineno, alias.name, inside)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}:{node.lineno}: say {PACKAGE} in full"
                for alias in node.names:
                    yield Import(node.lineno, f"{node.module}.{alias.name}", inside)

    def attributes(self) -> Iterator[Import]:
        """Yield every dotted name of two parts that is read: torch.ops."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                yield Import(node.lineno, f"{node.value.id}.{node.attr}")


def walk(tree: ast.AST, inside: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node and whether it is inside a function or under a condition."""
    held = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.If, ast.With)
    for node in ast.iter_child_nodes(tree):
        catches = isinstance(node, ast.Try) and bool(node.handlers)
        yield node, inside
        yield from walk(node, inside or catches or isinstance(node, held))


def read(path: Path, root: Path = ROOT) -> Source:
    parts = path.relative_to(root.parent).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    shown = path.relative_to(root.parent).as_posix()
    return Source(shown, module, ast.parse(path.read_text(encoding="utf-8"), shown))


SOURCES = {source.module: source for source in map(read, sorted(ROOT.rglob("*.py")))}


def resolved(target: str, known: Mapping[str, Source]) -> str:
    """Return the module that an import runs: the target itself, or what it is taken out of."""
    return target if target in known else target.rpartition(".")[0]


def part_of(module: str) -> str:
    """Return the part of the package that a module belongs to."""
    return [*module.split("."), "__init__"][1]


def misplaced(source: Source, known: Mapping[str, Source]) -> Iterator[str]:
    """Yield what a file may not import, as ``file:line: who (rank) may not import whom (rank)``."""
    if source.module == PACKAGE:
        return
    rank = RANKS[source.part]
    for found in source.imports():
        where = f"{source.path}:{found.line}"
        top = found.target.split(".")[0]
        if top != PACKAGE:
            continue
        other = part_of(resolved(found.target, known))
        if other == "__init__":
            yield f"{where}: {source.part} ({rank}) may not import {PACKAGE} itself"
        elif other != source.part and not RANKS[other] < rank:
            yield f"{where}: {source.part} ({rank}) may not import {other} ({RANKS[other]})"


def inner(source: Source) -> set[str]:
    """Return the modules of its own package that a file imports."""
    targets = (resolved(found.target, SOURCES) for found in source.imports())
    return {
        target
        for target in targets
        if target in SOURCES and part_of(target) == source.part and source.module != PACKAGE
    }


def cycle(edges: Mapping[str, set[str]]) -> list[str] | None:
    """Return a cycle as a list of names whose last is its first, or None."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(edges.get(name, ())):
            if found := search(other, [*path, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(edges) if (found := search(name, []))), None)


def complain(lines: list[str]) -> None:
    assert not lines, "\n" + "\n".join(lines)


def test_every_part_of_the_package_has_a_rank() -> None:
    parts = {source.part for source in SOURCES.values()} - {"__init__"}
    assert parts <= set(RANKS), f"give a rank to {', '.join(sorted(parts - set(RANKS)))}"


def test_every_rank_belongs_to_a_part_of_the_package() -> None:
    parts = {source.part for source in SOURCES.values()}
    assert set(RANKS) <= parts, f"there is no {', '.join(sorted(set(RANKS) - parts))}"


def test_imports_go_to_lower_ranks_only() -> None:
    complain([line for source in SOURCES.values() for line in misplaced(source, SOURCES)])


def test_inside_a_package_imports_are_acyclic() -> None:
    found = cycle({module: inner(source) for module, source in SOURCES.items()})
    assert found is None, " imports ".join(found or [])


def test_imports_stand_at_the_top_of_a_file() -> None:
    complain(
        [
            f"{source.path}:{found.line}: imports {found.target} inside a function or a condition"
            for source in SOURCES.values()
            if source.part not in LAZY
            for found in source.imports()
            if found.inside
        ]
    )


def test_no_import_is_for_types_alone() -> None:
    complain(
        [
            f"{source.path}:{found.line}: {found.target} hides an import from the running program"
            for source in SOURCES.values()
            for found in (*source.imports(), *source.attributes())
            if found.target == "typing.TYPE_CHECKING"
        ]
    )


@pytest.mark.parametrize("name", ONLY_IN)
def test_some_modules_are_touched_by_one_package_alone(name: str) -> None:
    complain(
        [
            f"{source.path}:{found.line}: {source.part} may not touch {name}, {ONLY_IN[name]} may"
            for source in SOURCES.values()
            if source.part not in ONLY_IN[name].split()
            for found in (*source.imports(), *source.attributes())
            if f"{found.target}.".startswith(f"{name}.")
        ]
    )


def test_nothing_else_is_imported_than_torch_three_libraries_and_what_python_brings() -> None:
    known = DEPENDENCIES | {PACKAGE} | sys.stdlib_module_names
    complain(
        [
            f"{source.path}:{found.line}: {found.target} is no dependency"
            for source in SOURCES.values()
            for found in source.imports()
            if found.target.split(".")[0] not in known
            if not (source.part in LAZY and found.inside)
        ]
    )


# --- the checks themselves ---------------------------------------------------------------------


def written(module: str, text: str) -> Source:
    path = f"{module.replace('.', '/')}.py"
    return Source(path, module, ast.parse(text, path))


def test_a_wrong_import_is_named_with_file_line_and_both_ranks() -> None:
    wrong = written("mono_quant.schemes.affine", "import torch\n\nfrom mono_quant.modules import x")
    assert list(misplaced(wrong, SOURCES)) == [
        "mono_quant/schemes/affine.py:3: schemes (5) may not import modules (7)"
    ]


@pytest.mark.parametrize(
    ("module", "text", "count"),
    [
        ("schemes.affine", "from mono_quant.base import Scheme", 0),
        ("schemes.affine", "from mono_quant.schemes.float_cast import FloatCast", 0),
        ("schemes.affine", "from mono_quant.observers import MinMax", 1),
        ("schemes.affine", "from mono_quant.observers.minmax import MinMax", 1),
        ("schemes.affine", "import mono_quant.observers.minmax", 1),
        ("schemes.affine", "def f():\n    from mono_quant.plan import Plan", 1),
        ("schemes.affine", "from mono_quant import Quantizer", 1),
        ("schemes.affine", "from mono_quant import plan", 1),
        ("schemes.affine", "import mono_quant", 1),
        ("comparison", "from mono_quant.quantizer import Quantizer", 1),
        ("demo.run", "from mono_quant.cli import main", 1),
        ("cli.main", "from mono_quant.api import quantize", 0),
        ("__main__", "from mono_quant.cli import main", 0),
    ],
)
def test_the_rule_is_what_it_says(module: str, text: str, count: int) -> None:
    assert len(list(misplaced(written(f"mono_quant.{module}", text), SOURCES))) == count


def test_a_cycle_is_found_and_shown() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"a"}}) == ["a", "a"]


def test_an_import_inside_a_function_or_a_condition_is_seen() -> None:
    text = (
        "import a\nif x:\n    import b\ndef f():\n    import c\nclass D:\n    import d\n"
        "try:\n    import e\nexcept OSError:\n    pass\ntry:\n    import f\nfinally:\n    pass"
    )
    found = [one.target for one in written("mono_quant.x", text).imports() if one.inside]
    assert found == ["b", "c", "e"]
