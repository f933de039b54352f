"""`python -m tests.fuzz`: tries mutants and prints what came of them, by error type."""

import argparse
import sys
import time
from collections import Counter

from tests.fuzz.hunt import child, hunt
from tests.fuzz.mutants import mutant

SHOWN = 40


def main() -> int:
    """Try the mutants that the command line names; return 1 if anything must not be."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--mutants", type=int, default=23_000, help="how many (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (%(default)s)")
    parser.add_argument("--only", type=int, help="number of a single one, to be shown")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child()
        return 0
    numbers = range(given.first, given.first + given.mutants)
    if given.only is not None:
        numbers = range(given.only, given.only + 1)
    outcomes: dict[str, Counter[str]] = {}
    kinds: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    start = time.monotonic()
    for count, tried in enumerate(hunt(numbers), 1):
        kinds[mutant(tried.number).how.partition(":")[0]] += 1
        for loader, outcome in tried.outcomes.items():
            outcomes.setdefault(loader, Counter())[outcome.partition(":")[0]] += 1
        if given.only is not None:
            print(mutant(tried.number).sample.name, mutant(tried.number).how)
            print("\n".join(f"{name}: {one}" for name, one in tried.outcomes.items()))
        for loader, outcome in tried.bad.items():
            if bad.total() < SHOWN or outcome not in bad:
                print(
                    f"{tried.number} ({mutant(tried.number).sample.name}; "
                    f"{mutant(tried.number).how}) {loader}: {outcome}",
                    flush=True,
                )
            bad[outcome] += 1
        if count % 1000 == 0:
            print(f"{count} tried, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    print(f"{len(numbers)} mutants; what was done to them:")
    print("  " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()))
    for loader, counted in outcomes.items():
        shown = ", ".join(f"{outcome} {count}" for outcome, count in counted.most_common())
        print(f"{loader}: {shown}")
    print(f"{bad.total()} outcomes that must not be")
    return 1 if bad else 0


sys.exit(main())
