"""Schemes by their name."""

from collections.abc import Mapping

from mono_quant.base import Scheme
from mono_quant.configurable import Config, Scalar, find_kind, registered
from mono_quant.errors import ConfigurationError, UnknownKindError
from mono_quant.numerics.granularity import PerGroup
from mono_quant.schemes.codebook import Codebook
from mono_quant.schemes.float8 import Float8
from mono_quant.schemes.microscaling import Microscaling

_NAMED: Mapping[str, Scheme] = {
    "fp8": Float8(),
    "mxfp4": Microscaling.mxfp4(),
    "mxfp6": Microscaling.mxfp6(),
    "mxfp8": Microscaling.mxfp8(),
    "nf4": Codebook.nf4(),
    "nvfp4": Microscaling.nvfp4(),
}
"""What formats are called, beside the kinds of schemes."""


def create_scheme(name: str, *, group_size: int | None = None, **options: Scalar) -> Scheme:
    """Return the scheme of a name.

    Args:
        name: "fp8", "mxfp4", "mxfp6", "mxfp8", "nf4" or "nvfp4", or the kind of one that was
            registered: "affine", "codebook", "fitted_codebook", "float8", "float_cast",
            "microscaling".
        group_size: how many neighbours share a scale.
        options: its fields, such as ``bits=3``.

    Raises:
        ConfigurationError: there is no such scheme, or it has no such field.
    """
    if name in _NAMED:
        config: Config = _NAMED[name].to_config()
    else:
        try:
            found = find_kind(name)
        except UnknownKindError as error:
            kinds = (kind for kind, cls in registered().items() if issubclass(cls, Scheme))
            raise ConfigurationError(
                f"there is no scheme {name!r}; there is {', '.join(sorted([*_NAMED, *kinds]))}"
            ) from error
        if not issubclass(found, Scheme):
            raise ConfigurationError(f"{name!r} is a {found.__name__}, which is no scheme")
        config = {"kind": name}
    if group_size is not None:
        config = {**config, "granularity": PerGroup(group_size).to_config()}
    return Scheme.from_config({**config, **options})
