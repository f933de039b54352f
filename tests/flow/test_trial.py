"""Machines on which oneDNN's integer operators cannot be trusted."""

import pytest
import torch

from mono_quant.flow import integer_flow
from mono_quant.kernels import onednn, trial
from mono_quant.kernels.store import STORE
from tests.flow.models import Joined, static


@pytest.mark.parametrize(("operator", "layers"), [("conv", 4), ("linear", 1)])
def test_layers_compute_in_float_where_their_operator_fails_and_say_why(
    monkeypatch: pytest.MonkeyPatch, operator: str, layers: int
) -> None:
    kept, x = static(Joined(), 2, 3, 17, 22)
    monkeypatch.setattr(onednn, f"refuse_{operator}", lambda: "it failed on trial: SIGILL")
    flow = integer_flow(kept)
    said = [
        line
        for line in flow.lines
        if line.endswith("; computed in float: it failed on trial: SIGILL")
    ]
    assert len(said) == layers
    with torch.no_grad():
        torch.testing.assert_close(flow.model(x), kept(x), rtol=0, atol=0.1)


@pytest.mark.parametrize("operator", ["conv", "linear"])
def test_an_operator_that_kills_its_process_is_refused(
    monkeypatch: pytest.MonkeyPatch, operator: str
) -> None:
    monkeypatch.setattr(STORE, "get", lambda name: None)
    monkeypatch.setattr(STORE, "set", lambda name, value: None)
    monkeypatch.setattr(onednn, f"_{operator.upper()}_TRIAL", "import os; os.kill(os.getpid(), 4)")
    assert "died of SIGILL" in str(getattr(onednn, f"refuse_{operator}")())


@pytest.mark.parametrize("operator", ["conv", "linear"])
def test_a_trial_that_finds_a_wrong_number_says_so(
    monkeypatch: pytest.MonkeyPatch, operator: str
) -> None:
    """The trial is no formality: with operators that are off by one it fails."""
    name = f"_{operator.upper()}_TRIAL"
    wrong = getattr(onednn, name).replace("exact =", "exact = 1 +")
    monkeypatch.setattr(STORE, "get", lambda name: None)
    monkeypatch.setattr(STORE, "set", lambda name, value: None)
    if trial.refusal(f"{operator} as it is", getattr(onednn, name)) is not None:
        pytest.skip("this machine has no such operator")
    assert "AssertionError: a product is wrong" in str(trial.refusal(operator, wrong))
