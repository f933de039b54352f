"""Convolutional networks, static INT8, beside peers: the class kept, as a graph, each package."""

from collections.abc import Sequence

from tests.benchmarks.contenders import onnxruntime, openvino, ours, torch_ao, torchao
from tests.benchmarks.contenders.arena import compare

NETWORKS = ("resnet", "efficientnet")
PACKAGES = {one.__name__: one.PACKAGE for one in (ours, torch_ao, torchao, onnxruntime, openvino)}
ROUNDS = {"1 image": 15, "images": 7}


def main(patterns: Sequence[str] = ("*",)) -> None:
    """Print what each package gains on each network, and how near it stays to float.

    Args:
        patterns: of what runs, "network, package: way".
    """
    print("ResNet-18's shapes with random weights, and EfficientNet-Lite0. Speed over the eager")
    print("float32 model, channels last, of the same process: medians over rounds in which all")
    print("packages take turns; by processor time, every process on one thread of one core. dB:")
    print("SQNR of the logits against that model's. Every package has its own environment.\n")
    for network in NETWORKS:
        compare(network, PACKAGES, ROUNDS, "convolutions", patterns)


if __name__ == "__main__":
    main()
