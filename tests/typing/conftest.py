"""The option that asks pyright too."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pyright", action="store_true", help="ask pyright too, which is to agree")
