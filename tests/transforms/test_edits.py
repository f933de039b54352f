"""Structural changes made again on a skeleton, from data that nobody vouches for."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mono_quant import CheckpointError, FoldBatchNorm, Quantizer, load_model
from mono_quant.configurable import Json
from mono_quant.transforms import repeat
from tests.helpers import noise, same_tensors
from tests.transforms.models import ResNet, lived_in


def folding_of(model: nn.Module) -> Json:
    """Return what folding changes in a model's structure, as it comes out of a file."""
    changes = FoldBatchNorm().apply(copy.deepcopy(model))
    edits = [edit.to_config() for change in changes for edit in change.edits]
    back: Json = json.loads(json.dumps(edits))
    return back


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_folded_model_is_loaded_into_the_skeleton_it_came_from(
    suffix: str, tmp_path: Path
) -> None:
    source = lived_in(ResNet()).float()
    result = Quantizer().transform(FoldBatchNorm()).apply(source, progress=False)
    path = result.save(tmp_path / f"model{suffix}")
    loaded = load_model(path, ResNet().eval())
    x = noise(2, 3, 16, 16)
    assert same_tensors(loaded, result.model)
    assert torch.equal(loaded(x), result.model(x))


def test_the_list_is_plain_data() -> None:
    assert folding_of(lived_in(pair())) == [
        {"op": "bias", "path": "0"},
        {"op": "identity", "path": "1"},
    ]


def test_a_skeleton_without_memory_gets_a_bias_without_memory() -> None:
    with torch.device("meta"):
        skeleton = pair().half()
    skeleton.requires_grad_(False)
    repeat(skeleton, folding_of(lived_in(pair())))
    bias = skeleton[0].get_parameter("bias")
    assert bias.is_meta
    assert (bias.shape, bias.dtype, bias.requires_grad) == ((8,), torch.float16, False)
    assert type(skeleton[1]) is nn.Identity


def test_a_module_under_two_names_is_removed_under_both() -> None:
    skeleton = pair()
    skeleton.add_module("again", skeleton[1])
    repeat(skeleton, [{"op": "identity", "path": "1"}])
    assert skeleton[1] is skeleton[3]
    assert isinstance(skeleton[1], nn.Identity)


def test_what_is_so_already_is_left_alone() -> None:
    skeleton = pair()
    edits = folding_of(lived_in(pair()))
    repeat(skeleton, edits)
    before = copy.deepcopy(skeleton)
    repeat(skeleton, edits)
    assert same_tensors(skeleton, before)


HOSTILE: dict[str, Json] = {
    "no list": {"op": "identity", "path": "1"},
    "nothing": None,
    "a text": "identity",
    "a list of texts": ["identity"],
    "no path": [{"op": "identity"}],
    "a path that is no text": [{"op": "identity", "path": 1}],
    "more than that": [{"op": "identity", "path": "1", "class": "os.system"}],
    "an unknown op": [{"op": "exec", "path": "1"}],
    "an op that is a list": [{"op": ["identity"], "path": "1"}],
    "a path that is not there": [{"op": "identity", "path": "7"}],
    "a path into an attribute": [{"op": "identity", "path": "1.__class__"}],
    "the model itself": [{"op": "identity", "path": ""}],
    "another layer": [{"op": "identity", "path": "0"}],
    "an activation": [{"op": "identity", "path": "2"}],
    "a bias where none can be": [{"op": "bias", "path": "1"}],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_does_not_fit_is_refused_before_anything_changes(name: str) -> None:
    skeleton = pair()
    before = list(skeleton.children())
    edits = HOSTILE[name]
    if isinstance(edits, list):
        edits = [{"op": "bias", "path": "0"}, *edits]
    with pytest.raises(CheckpointError):
        repeat(skeleton, edits)
    assert list(skeleton.children()) == before
    assert skeleton[0].bias is None
