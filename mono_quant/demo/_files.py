"""Finds data files inside installed packages without importing those packages."""

from importlib import metadata
from pathlib import Path

from mono_quant.errors import MonoQuantError


class DemoUnavailable(MonoQuantError, RuntimeError):
    """A package that the demo takes its model, data or tokenizer from is not installed."""

    def __init__(self, missing: str) -> None:
        """Names what is missing and says how to get it.

        Args:
            missing: what the demo looked for, as the start of the message.
        """
        command = 'pip install -c constraints.txt ".[demo]"'
        super().__init__(f"{missing}; install the demo, in a clone, with: {command}")


def packaged_file(distribution: str, member: str) -> Path:
    """Finds a file that an installed distribution carries.

    Args:
        distribution: the name of the distribution, as given to pip.
        member: the path of the file inside the installation folder, with forward slashes.

    Returns:
        The path of the existing file.

    Raises:
        DemoUnavailable: if the distribution is not installed or carries no such file.
    """
    try:
        located = metadata.distribution(distribution).locate_file(member)
    except metadata.PackageNotFoundError as error:
        raise DemoUnavailable(f"the package {distribution!r} is not installed") from error
    path = Path(str(located))
    if not path.is_file():
        raise DemoUnavailable(f"the installed package {distribution!r} has no file {member!r}")
    return path
