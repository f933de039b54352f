"""What a product survives: kills at any moment, a thousand rounds, many threads.

Functions take how often; tests ask for a little, and `nox -s bench -- endurance` for much.
"""
