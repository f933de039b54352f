"""Libraries that people run models in, with the real packages: the library is told of none of them.

`nox -s neighbours` installs them; the tests of one are skipped by its name where it is absent.
"""
