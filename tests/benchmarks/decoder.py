"""Language models beside peers: a small Llama and SmolLM2, one token and prefill, each package."""

from collections.abc import Sequence

from tests.benchmarks.contenders import (
    bitsandbytes,
    onnxruntime,
    openvino,
    ours,
    quanto,
    torch_ao,
    torchao,
)
from tests.benchmarks.contenders.arena import compare

NETWORKS = ("decoder", "smollm2")
PACKAGES = {
    one.__name__: one.PACKAGE
    for one in (ours, torch_ao, torchao, quanto, bitsandbytes, onnxruntime, openvino)
}
ROUNDS = {"1 token": 15, "cached": 15, "tokens": 5}


def main(patterns: Sequence[str] = ("*",)) -> None:
    """Print what each package gains on each network, and how near it stays to float.

    Args:
        patterns: of what runs, "network, package: way".
    """
    print("Speed over the eager float32 model of the same process: medians over rounds in which")
    print(
        "all packages take turns, each call after an untimed one of its own, as tokens follow each"
    )
    print("other; by processor time, every process on one thread of one core.")
    print("dB: SQNR of the logits against that model's. Every package has its own environment.")
    print("'cached': one token after 256 whose keys and values are given; ONNX Runtime and")
    print("OpenVINO are given whole sequences only. MB: as saved.\n")
    for network in NETWORKS:
        compare(network, PACKAGES, ROUNDS, "decoders", patterns)


if __name__ == "__main__":
    main()
