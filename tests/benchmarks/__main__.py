"""Runs the benchmarks: `python -m tests.benchmarks [name ...]`; without a name, all of them."""

import argparse
import importlib

from tests.benchmarks.measure import machine

NAMES = (
    "accuracy",
    "methods",
    "models",
    "memory",
    "imports",
    "quantize_speed",
    "observers",
    "half_quadratic",
    "accuracy_peers",
    "activations_vision",
    "vision_methods",
    "activations_peers",
    "activations_text",
    "character_methods",
    "activations_speech",
    "outliers",
    "scaling",
    "estimates",
    "advice",
    "convolutions",
    "decoder",
    "fused",
    "kernels",
    "limits",
    "recurrent",
    "faster",
    "cuda",
    "endurance",
)

CONTESTS = ("accuracy_peers", "decoder", "convolutions")
"""Those of several packages, some of whose ways can be left out."""


def main() -> None:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(NAMES))
    parser.add_argument("--list", action="store_true", help="say what each one measures")
    parser.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help=f"of the packages' ways in {', '.join(CONTESTS)} those, as '*torch.ao: *'",
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    for name in arguments.names or NAMES:
        module = importlib.import_module(f"tests.benchmarks.{name}")
        if arguments.list:
            print(f"{name:20}{(module.__doc__ or '').splitlines()[0]}")
            continue
        print(f"\n## {name}\n\n{machine()}\n", flush=True)
        if name in CONTESTS:
            module.main(arguments.only or ("*",))
        else:
            module.main()


main()
