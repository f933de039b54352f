"""In its own process: loads a quantized MiniLM and repeats a batch that another ran."""

import json
import sys

import torch

from mono_quant import load_model
from mono_quant.demo import MiniLM


def child(path: str, probe: str) -> None:
    """Print whether the model of a file gives the saved output, to the bit."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        skeleton = MiniLM()
    model = load_model(path, skeleton).eval()
    ids, mask, output = torch.load(probe, weights_only=True)
    with torch.no_grad():
        print(json.dumps({"equal": torch.equal(model(ids, mask), output)}))


if __name__ == "__main__":
    child(*sys.argv[1:])
