"""The project's checks, each in an environment of its own. `nox -l` lists them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_external_run = True
nox.options.reuse_venv = "yes"

BY_WORKERS = (f"--numprocesses={min(4, os.cpu_count() or 1)}", "--dist=worksteal")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Workers that share threads wait for each other; and results then depend on their number."""

USES = [f"tests/{name}" for name in ("cli", "files", "serializers", "testing")]
USES += [f"tests/test_{name}.py" for name in ("api", "configurable", "progress", "settings")]
"""Tests of what attrs, safetensors and tqdm are used for: classes, files and bars."""

PYPROJECT = nox.project.load_toml("pyproject.toml")
CONSTRAINTS = Path("constraints.txt")

SMOKE = """
from pathlib import Path

import mono_quant
import torch
from torch import nn

assert "site-packages" in mono_quant.__file__, mono_quant.__file__
assert Path(mono_quant.__file__).with_name("py.typed").is_file(), "the wheel lost its types"


def skeleton() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()


model, x = skeleton(), torch.randn(8, 64)
result = mono_quant.Quantizer().bits(4).apply(model)
result.save("model.safetensors")
restored = mono_quant.load_model("model.safetensors", skeleton())
assert not torch.equal(result.model(x), model(x)), "nothing was quantized"
assert torch.equal(restored(x), result.model(x)), "a saved model came back different"
"""


def pins() -> dict[str, str]:
    """What constraints.txt says, as names and releases."""
    lines = CONSTRAINTS.read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def oldest() -> dict[str, str]:
    """The lower bound of each runtime dependency in pyproject.toml."""
    return {
        requirement.name: bound.version
        for requirement in map(Requirement, PYPROJECT["project"]["dependencies"])
        for bound in requirement.specifier
        if bound.operator == ">="
    }


def group(name: str) -> tuple[str, ...]:
    """The requirements of one dependency group of pyproject.toml."""
    return nox.project.dependency_groups(PYPROJECT, name)


def install(session: nox.Session, *packages: str, older: dict[str, str] | None = None) -> None:
    """Install under constraints.txt, torch before all else so that no package chooses its build.

    Only modules that are imported are compiled, then: all of torch's take longer than to unpack it.
    """
    chosen = pins() | (older or {})
    constraints = Path(session.virtualenv.location, "constraints.txt")
    constraints.write_text("".join(f"{name}=={release}\n" for name, release in chosen.items()))
    for wanted in ([f"torch=={chosen['torch']}"], packages):
        session.install("--no-compile", "-c", str(constraints), *wanted)


def run_tests(session: nox.Session, *options: str) -> None:
    """Run pytest on all but the benchmarks, the docs and the types: they have other sessions."""
    elsewhere = [f"--ignore=tests/{name}" for name in ("benchmarks", "docs", "typing")]
    session.run("pytest", *BY_WORKERS, *elsewhere, *options, *session.posargs, env=ONE_THREAD)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the test suite."""
    install(session, "-e", ".[demo,plot]", *group("tests"))
    run_tests(session)


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check every type, strictly."""
    install(session, "-e", ".", *group("typecheck"))
    session.run("mypy", *session.posargs)
    session.run("pytest", "tests/typing")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install("-c", str(CONSTRAINTS), *group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation and run every snippet in it."""
    install(session, "-e", ".[demo]", *group("docs"))
    with tempfile.TemporaryDirectory() as site:
        session.run("sphinx-build", "-W", "--keep-going", "-q", "docs", site)
    session.run("pytest", *BY_WORKERS, "tests/docs", *session.posargs, env=ONE_THREAD)


@nox.session(reuse_venv=False)
def dist(session: nox.Session) -> None:
    """Build the distribution and use its wheel, with nothing else installed, from elsewhere."""
    with tempfile.TemporaryDirectory() as built, tempfile.TemporaryDirectory() as empty:
        session.install("-c", str(CONSTRAINTS), *group("dist"))
        session.run("python", "-m", "build", "--no-isolation", "--outdir", built)
        install(session, *map(str, Path(built).glob("*.whl")))
        with session.chdir(empty):
            session.run("python", "-c", SMOKE)
            session.run("monoquant", "--help")


@nox.session(default=False, reuse_venv=False)
def plugins(session: nox.Session) -> None:
    """Install two distributions of extensions beside the built package, check and test them."""
    found = sorted(path.parent.resolve() for path in Path("tests/plugins").glob("*/pyproject.toml"))
    install(session, ".", *map(str, found), "pytest", "mypy")
    for plugin in found:
        with session.chdir(plugin):  # from where the checkout's own package is not seen
            session.run("mypy")
            session.run("pytest", "-p", "no:cacheprovider", env=ONE_THREAD)


@nox.session(default=False)
def pyright(session: nox.Session) -> None:
    """See that pyright agrees with mypy on what is rejected (brings a Node.js of its own)."""
    install(session, "-e", ".", *group("typecheck"), "pyright[nodejs]")
    session.run("pytest", "tests/typing", "--pyright")


@nox.session
def minimums(session: nox.Session) -> None:
    """Run the fast tests of `USES` with the oldest attrs, safetensors and tqdm that are allowed.

    By them models are planned, quantized, saved and loaded, and every class keeps its laws. Those
    of kernels are left out: products are a matter of torch, and trying them takes long.
    """
    older = oldest() | {"torch": pins()["torch"]}
    install(session, "-e", ".", *group("tests"), older=older)
    run_tests(session, "-m", "not slow and not network", "-k", "not kernels", *USES)


@nox.session(default=False)
def older_torch(session: nox.Session) -> None:
    """Run the fast tests with the oldest torch that is allowed (may fetch gigabytes)."""
    older = {"torch": oldest()["torch"]}
    install(session, "-e", ".", *group("tests"), older=older)
    run_tests(session, "-m", "not slow and not network")


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Try 23,000 damaged and forged files on their loaders, and print what came of them."""
    install(session, "-e", ".", *group("tests"))
    session.run("python", "-m", "tests.fuzz", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def neighbours(session: nox.Session) -> None:
    """Run quantized models in transformers, Lightning and accelerate."""
    install(session, "-e", ".", *group("neighbours"))
    session.run("pytest", "tests/neighbours", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure what the documentation claims about speed, size and accuracy."""
    install(session, "-e", ".[demo]", *group("tests"))
    session.run("python", "-m", "tests.benchmarks", *session.posargs)


@nox.session(default=False)
def fmt(session: nox.Session) -> None:
    """Format the code and mend what ruff can mend."""
    session.install("-c", str(CONSTRAINTS), *group("lint"))
    session.run("ruff", "check", "--fix")
    session.run("ruff", "format")
