"""What holds for the tests of integer flow."""

import pytest

import mono_quant.kernels


@pytest.fixture(autouse=True)
def _class_kept_models_compute_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the model that keeps its class the oracle, whatever kernels there are."""
    monkeypatch.setattr(mono_quant.kernels, "KERNELS", (mono_quant.kernels.REFERENCE,))
