"""What holds for every test."""

import faulthandler
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

collect_ignore = ["plugins"]
"""Distributions of their own, with tests of their own: `nox -s plugins`."""

# Derandomized, so that a check that passed yesterday passes today. To search for more:
# pytest --hypothesis-profile=search
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("steady")


def _bfloat16_product_works() -> bool:
    """Return whether a child process survives one."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        torch.ones(8, 64, dtype=torch.bfloat16).matmul(torch.ones(64, 32, dtype=torch.bfloat16))
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


# Some virtual machines announce AMX and kill the process that uses it.
if hasattr(os, "fork") and "ONEDNN_MAX_CPU_ISA" not in os.environ and not _bfloat16_product_works():
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX10_1_512"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what kernels find out of this machine away from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Give the weights that a module makes while it is imported the same numbers in every run."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)
