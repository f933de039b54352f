"""Measures what the documentation claims: accuracy, memory, speed.

Times and sizes are printed, never asserted. Timed code runs on one thread, contenders take turns,
and a table shows medians and ratios, which carry from one machine to another better than seconds.
"""
