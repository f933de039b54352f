"""Makes the environments that other packages are measured in, each with this one's torch.

They are kept where the real models are (see `tests.models.assets`), so that they are made once.
"""

import hashlib
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from tests.models.assets import cache_folder

_CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
_SHARED = ("attrs", "safetensors", "tqdm", "numpy")  # what these benchmarks themselves import
_TIMEOUT_S = 1200
_DONE = "made"


class EnvironmentUnavailable(RuntimeError):
    """Packages cannot be installed here; the message says why."""


def python_with(packages: Sequence[str]) -> Path:
    """Return the interpreter of an environment with these packages, made if there is none.

    torch comes first, at the release of `constraints.txt`, so that no package chooses another.
    All else is held to that file too, but for what the requirements themselves name.

    Args:
        packages: requirements; none for the environment that this process runs in.

    Raises:
        EnvironmentUnavailable: they cannot be installed.
    """
    if not packages:
        return Path(sys.executable)
    pins = _CONSTRAINTS.read_text().splitlines()
    torch = next(line for line in pins if line.startswith("torch=="))
    asked = (torch, *_SHARED, *packages)
    named = {package.partition("==")[0] for package in packages}
    held = [line for line in pins if line.partition("==")[0] not in named]
    told = " ".join((sys.version, _CONSTRAINTS.read_text(), *asked))
    digest = hashlib.sha256(told.encode()).hexdigest()[:12]
    name = packages[0].partition("==")[0]
    folder = cache_folder() / "environments" / f"{name}-{digest}"
    python = folder / "bin" / "python"
    if not (folder / _DONE).is_file():
        venv.create(folder, clear=True, with_pip=True)
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(held))
        _install(python, constraints, torch)
        _install(python, constraints, *asked)
        (folder / _DONE).touch()
    return python


def _install(python: Path, constraints: Path, *requirements: str) -> None:
    pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), *requirements]
    try:
        done = subprocess.run(pip, check=False, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as late:
        raise EnvironmentUnavailable(f"pip took more than {_TIMEOUT_S} s") from late
    if done.returncode:
        printed = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise EnvironmentUnavailable(printed[-1] if printed else f"pip gave {done.returncode}")
