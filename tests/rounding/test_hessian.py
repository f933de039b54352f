"""Factors of second moments, against what they multiply to in float64."""

import pytest
import torch
from torch import Tensor

from mono_quant.rounding.hessian import Factor, Hessian, HessianState
from tests.helpers import noise

DAMPING = 0.02
SIZES = (1, 2, 3, 9, 17, 27, 32, 50, 100)
"""Also those that are no multiple of what a processor takes at once."""


def rows(matrices: int, length: int) -> Tensor:
    """Return correlated rows whose columns differ in size by orders of magnitude."""
    mixed = noise(matrices, 3 * length, length) @ noise(matrices, length, length, seed=1)
    order = noise(length, seed=2).argsort()
    return mixed * torch.logspace(-3, 3, length)[order]


def damped(state: HessianState) -> Tensor:
    """Return the second moments with the mean of their diagonal added in part, in float64."""
    moments = state.gram.double() / state.count
    level = moments.diagonal(dim1=1, dim2=2).mean(1)
    return moments + torch.eye(moments.shape[1]) * (DAMPING * level)[:, None, None]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("length", SIZES)
def test_the_factor_makes_the_matrix_diagonal(length: int, ordered: bool) -> None:
    state = Hessian().observe(rows(2, length))
    factor = state.factor(DAMPING, ordered)
    for upper, order, moments in zip(factor.upper, factor.order, damped(state), strict=True):
        assert torch.equal(upper, upper.triu())
        assert torch.equal(upper.diagonal(), torch.ones(length))
        inverse = torch.linalg.inv(upper.double())
        left = inverse @ moments[order][:, order] @ inverse.t()
        sizes = left.diagonal()
        assert bool((sizes > 0).all())
        apart = (left - torch.diag(sizes)) / (sizes[:, None] * sizes).sqrt()
        assert float(apart.abs().max()) < 1e-4
        if ordered:
            assert bool((moments.diagonal()[order].diff() <= 0).all())


def test_the_matrix_that_is_factored_stays_as_it_was() -> None:
    state = Hessian().observe(rows(1, 17))
    before = state.gram.clone()
    state.factor(DAMPING, ordered=True)
    assert torch.equal(state.gram, before)


def test_inputs_that_were_always_zero_stand_alone() -> None:
    x = rows(1, 9)
    x[:, :, [2, 7]] = 0
    factor = Hessian().observe(x).factor(DAMPING, ordered=False)
    for dead in (2, 7):
        expected = torch.zeros(9)
        expected[dead] = 1
        assert torch.equal(factor.upper[0, dead], expected)
        assert torch.equal(factor.upper[0, :, dead], expected)


def test_what_rounding_made_indefinite_is_damped_more() -> None:
    """Eigenvalues -0.05 and 2.05: a hundredth of the mean does not lift the first, a tenth does."""
    gram = torch.tensor([[[1.0, 1.05], [1.05, 1.0]]])
    factor = Factor.of(HessianState(gram, 1), 0.01, ordered=False)
    assert float(factor.upper[0, 0, 1]) == pytest.approx(1.05 / 1.1)


def test_what_no_damping_helps_is_refused_with_the_most_that_was_tried() -> None:
    gram = torch.tensor([[[1.0, 9.0], [9.0, 1.0]]])
    with pytest.raises(
        ValueError, match=r"second moments of its inputs are singular, damped by 1$"
    ):
        Factor.of(HessianState(gram, 1), 0.01, ordered=False)
