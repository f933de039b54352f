"""Integer flow: convolutional networks as graphs of codes beside float and the class-kept model."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from mono_quant import Quantizer
from mono_quant.flow import integer_flow
from tests.benchmarks.measure import median_seconds, print_table, sqnr
from tests.flow.models import ResNet, alive
from tests.models import AssetUnavailable, efficientnet_lite0

BATCHES = (1, 8)
REPEATS = 9
_WIDTHS = (64, 128, 256, 512)


def main() -> None:
    """Print speed-ups over float, and how near the outputs stay to it."""
    columns = (
        "network",
        "batch",
        "fp32 channels_last, ms",
        "class-kept static",
        "integer flow",
        "asymmetric weights: products in float",
        "asymmetric weights: integer flow",
        "SQNR of outputs: class-kept → flow",
        "of asymmetric weights",
    )
    print(f"Speed-ups over fp32: ratios of medians of {REPEATS} runs, by turns.\n")
    print_table(columns, _rows())


def _rows() -> Iterator[tuple[str, ...]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 224, 224, generator=generator)
    torch.manual_seed(0)
    model = alive(ResNet(_WIDTHS, 1000))
    yield from _measured("ResNet-18 shapes, random weights", model, images[:8], images[8:])
    try:
        published = efficientnet_lite0.load()
        crops, photos = efficientnet_lite0.unlabelled_crops(), efficientnet_lite0.labelled_images()
    except AssetUnavailable as reason:
        yield ("EfficientNet-Lite0", "", f"skipped: {reason}", *[""] * 6)
        return
    yield from _measured("EfficientNet-Lite0", published, crops[::6], photos[0])


@torch.no_grad()
def _measured(
    name: str, model: nn.Module, data: Tensor, images: Tensor
) -> Iterator[tuple[str, ...]]:
    quantizer = Quantizer().activations("static").fit(list(torch.split(data, 8)))
    exact, near, models = [model(images)], [], []
    for chosen in (quantizer, quantizer.asymmetric()):
        kept = chosen.apply(model, progress=False).model
        graph = integer_flow(kept).model
        found = (f"{sqnr(exact, [other(images)]):.1f}" for other in (kept, graph))
        near.append(f"{' → '.join(found)} dB")
        models.append((kept, graph))
    (doors, flow), (kept, asymmetric) = models
    floats = integer_flow(kept, reference=True).model
    for weight in model.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    for batch in BATCHES:
        x = images[:batch]
        laid = x.contiguous(memory_format=torch.channels_last)
        actions = [partial(one, laid) for one in (model, doors, flow, floats, asymmetric)]
        for action in actions:
            action()
        base, *others = median_seconds(actions, REPEATS)
        ratios = [f"{base / other:.2f}" for other in others]
        yield (name, str(batch), f"{base * 1e3:.1f}", *ratios, *near)
