"""Whole models as each package quantizes them, each package in a process of its own."""
