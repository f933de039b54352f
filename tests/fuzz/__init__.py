"""Valid files, changed at random, and every loader run on them: only our own errors may come out.

`nox -s fuzz` tries 23,000 mutants in processes of their own, whose memory and time are limited, and
prints what came of them. A mutant is its number: `python -m tests.fuzz --only 1234` shows one.
"""
