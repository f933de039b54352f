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
    "peers",
    "activations_vision",
    "activations_peers",
    "activations_text",
    "activations_speech",
    "outliers",
    "scaling",
    "advice",
    "convolutions",
    "decoder",
    "fused",
    "kernels",
    "limits",
    "recurrent",
    "faster",
    "endurance",
)


def main() -> None:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(NAMES))
    parser.add_argument("--list", action="store_true", help="say what each one measures")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    for name in arguments.names or NAMES:
        module = importlib.import_module(f"tests.benchmarks.{name}")
        if arguments.list:
            print(f"{name:20}{(module.__doc__ or '').splitlines()[0]}")
            continue
        print(f"\n## {name}\n\n{machine()}\n", flush=True)
        module.main()


main()
