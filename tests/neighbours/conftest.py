"""What holds for every test here."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

ROWS = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network() -> nn.Sequential:
    """Return two float layers."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()


@pytest.fixture
def rows() -> Tensor:
    """Return what the network takes, [8, 64]."""
    return ROWS


@pytest.fixture
def loader() -> "DataLoader[Tensor]":
    """Return the same rows in two batches."""
    return DataLoader(cast("Dataset[Tensor]", ROWS), batch_size=4)
