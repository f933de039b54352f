"""Quantized modules whose class has a `save_pretrained` that would lose their weights."""

import copy
import pickle
from pathlib import Path

import pytest
from torch import nn

from mono_quant import CheckpointError, Quantizer, dequantize_model, load_model


class Foreign(nn.Module):
    """A module such as a hub's library has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)

    def save_pretrained(self, folder: Path) -> Path:
        return folder


class Holder(nn.Module):
    """Holds one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = Foreign(), Foreign()


def refused(model: Foreign) -> bool:
    try:
        model.save_pretrained(Path())
    except CheckpointError as error:
        return "config.save_pretrained(folder)" in str(error)
    return False


def test_it_refuses_wherever_a_quantized_layer_is_below() -> None:
    model = Holder()
    result = Quantizer().skip("other").apply(model)
    assert refused(result.model.inner)
    assert not refused(result.model.other)
    assert not refused(model.inner)
    assert type(result.model.inner) is Foreign


def test_it_refuses_of_copies_of_loaded_ones_and_of_ones_in_place(tmp_path: Path) -> None:
    result = Quantizer().apply(Foreign())
    loaded = load_model(result.save(tmp_path / "s.pt"), Foreign())
    inner = Foreign()
    Quantizer().apply_(inner)
    copies = copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))
    assert all(map(refused, (result.model, loaded, inner, *copies)))


def test_a_float_model_saves_as_before() -> None:
    result = Quantizer().apply(Foreign())
    assert not refused(result.dequantize())
    assert not refused(dequantize_model(result.model))
    assert refused(result.model)


def test_one_that_knows_better_can_be_had_back() -> None:
    model = Quantizer().apply(Foreign()).model
    del model.save_pretrained
    assert not refused(model)
    with pytest.raises(AttributeError):
        del model.save_pretrained
