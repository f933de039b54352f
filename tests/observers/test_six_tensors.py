"""Six distributions: how far each observer is from the range of least squared error, in dB."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

with pytest.warns(DeprecationWarning, match="torch.ao.quantization"):
    pass
