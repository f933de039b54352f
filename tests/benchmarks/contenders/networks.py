"""The networks that packages are compared on, and what they are run on."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tests.benchmarks.contenders import llama
from tests.benchmarks.contenders.contender import Task
from tests.benchmarks.contenders.plain import plain
from tests.flow.models import ResNet, alive
from tests.models import efficientnet_lite0, smollm2

PREFILL = 256
IMAGES = (1, 8)
_WIDTHS = (64, 128, 256, 512)
_SIDE = 224

Inputs = tuple[dict[str, tuple[Tensor, ...]], list[Tensor]]
"""Workloads, and calibration batches."""


def load(name: str) -> nn.Module:
    """Return a float network as these benchmarks quantize it themselves."""
    return _MODELS[name]()


def load_plain(name: str, example: Tensor) -> nn.Module:
    """Return a float network of torch's own modules alone, for the tracers of others."""
    model = load(name)
    if isinstance(model, efficientnet_lite0.EfficientNetLite0):
        return plain(model, example)
    return model


def inputs(name: str) -> Inputs:
    """Return what a network is run on.

    Raises:
        AssetUnavailable: it is not to be had here.
    """
    return _INPUTS[name]()


def task(name: str, found: Inputs, *, ours: bool) -> Task:
    """Return a network with its inputs, images and filters in the order channels last."""
    workloads, calibration = found
    model = load(name) if ours or not calibration else load_plain(name, calibration[0][:1])
    for weight in model.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return Task(model, workloads, calibration)


def _resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return alive(ResNet(_WIDTHS, 1000))


def _decoder_inputs() -> Inputs:
    ids = torch.randint(llama.VOCABULARY, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    return {
        "1 token": (ids[:, :1],),
        f"1 token, {PREFILL} cached": (ids[:, :1], llama.cache(PREFILL)),
        f"{PREFILL} tokens": (ids,),
    }, []


def _smollm2_inputs() -> Inputs:
    ids = smollm2.text_windows()["news"][:1, :PREFILL]
    return {"1 token": (ids[:, :1],), f"{PREFILL} tokens": (ids,)}, []


def _resnet_inputs() -> Inputs:
    images = torch.randn(16, 3, _SIDE, _SIDE, generator=torch.Generator().manual_seed(0))
    return _of_images(images[8:]), list(torch.split(images[:8], 8))


def _efficientnet_inputs() -> Inputs:
    images, _ = efficientnet_lite0.labelled_images()
    return _of_images(images), list(torch.split(efficientnet_lite0.unlabelled_crops()[::6], 8))


def _of_images(images: Tensor) -> dict[str, tuple[Tensor, ...]]:
    return {
        f"{count} image{'s' * (count > 1)}": (
            images[:count].contiguous(memory_format=torch.channels_last),
        )
        for count in IMAGES
    }


_MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "decoder": llama.load,
    "smollm2": smollm2.load,
    "resnet": _resnet,
    "efficientnet": efficientnet_lite0.load,
}
_INPUTS: Mapping[str, Callable[[], Inputs]] = {
    "decoder": _decoder_inputs,
    "smollm2": _smollm2_inputs,
    "resnet": _resnet_inputs,
    "efficientnet": _efficientnet_inputs,
}
