"""Dynamic W8A8 of MiniLM and SmolLM2, a range for each token, beside torch.ao and torchao.

Dynamic quantization sees no data, so none is kept apart. The Linears of the blocks are quantized,
all else stays float.
"""

from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from mono_quant import Quantizer, Rotate
from mono_quant.demo import lee_documents, pearson_with_humans
from tests.benchmarks.dynamic_peers import dynamic, engine
from tests.benchmarks.measure import print_table, sqnr
from tests.benchmarks.minilm import embeddings, original, reference
from tests.models import AssetUnavailable, smollm2

WINDOWS = 2
LENGTH = 256
DYNAMIC = Quantizer().activations("dynamic")
OURS = {
    "symmetric weights": DYNAMIC,
    "asymmetric weights": DYNAMIC.asymmetric(),
    "asymmetric, MSE weights": DYNAMIC.asymmetric().observer(weights="mse"),
    "7-bit inputs": Quantizer().activations("dynamic", bits=7),
    "inputs turned": DYNAMIC.transform(Rotate()),
}


def in_blocks(name: str, module: nn.Module) -> bool:
    """Return whether a layer is a Linear of the blocks."""
    return isinstance(module, nn.Linear) and name.startswith("blocks.")


def main() -> None:
    """Print the embeddings' table, then the language model's."""
    print(f"{engine()}\n")
    print("MiniLM: embeddings of 50 documents and 200 lines against the float model's.\n")
    columns = ("package", "setting", "SQNR, dB", "mean cosine", "least cosine", "Lee Pearson")
    print_table(columns, _minilm())
    try:
        float_logits()
    except AssetUnavailable as reason:
        print(f"SmolLM2 is skipped: {reason}")
        return
    print(f"SmolLM2: {WINDOWS} windows of {LENGTH} tokens of news; few, so compare rows only.\n")
    columns = ("package", "setting", "perplexity", "mean KL, nats", "top-1 agreement", "SQNR, dB")
    print_table(columns, _smollm2())


def cosines(outputs: Tensor) -> Tensor:
    """Return the cosine of each embedding with the float model's, [250]."""
    return functional.cosine_similarity(reference().double(), outputs.double(), dim=1)


def _minilm() -> Iterator[tuple[str, ...]]:
    documents = len(lee_documents())
    pearson = pearson_with_humans(reference()[:documents])
    yield ("float", "", "", "1.0000", "1.0000", f"{pearson:.4f}")
    for found in dynamic(original(), in_blocks, OURS):
        if found.model is None:
            yield (found.package, found.setting, found.reason, "", "", "")
            continue
        outputs = embeddings(found.model)
        near = cosines(outputs)
        yield (
            found.package,
            found.setting,
            f"{sqnr([reference()], [outputs]):.2f}",
            f"{near.mean():.4f}",
            f"{near.min():.4f}",
            f"{pearson_with_humans(outputs[:documents]):.4f}",
        )


@cache
def language_model() -> nn.Module:
    """Return SmolLM2 in float."""
    return smollm2.load()


@cache
def tokens() -> Tensor:
    """Return the beginning of the news, [2, 256]."""
    return smollm2.text_windows()["news"].flatten()[: WINDOWS * LENGTH].view(WINDOWS, LENGTH)


@cache
def float_logits() -> Tensor:
    """Return the float model's logits of the tokens."""
    return logits(language_model())


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Return a model's logits of the tokens."""
    return torch.cat([model(ids) for ids in torch.split(tokens(), 1)])


def _smollm2() -> Iterator[tuple[str, ...]]:
    yield ("float", "", *judged(float_logits()).values())
    ours = {name: OURS[name] for name in ("symmetric weights", "inputs turned")}
    for found in dynamic(language_model(), in_blocks, ours):
        if found.model is None:
            yield (found.package, found.setting, found.reason, "", "", "")
            continue
        yield (found.package, found.setting, *judged(logits(found.model)).values())


def judged(found: Tensor) -> Mapping[str, str]:
    """Return perplexity, KL, agreement and SQNR of logits of the tokens, beside the float ones."""
    reference = float_logits()
    loss = functional.cross_entropy(found[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    one, other = (x.double().log_softmax(dim=-1) for x in (reference, found))
    kl = functional.kl_div(other, one, log_target=True, reduction="none").sum(dim=-1).mean()
    same = (found.argmax(dim=-1) == reference.argmax(dim=-1)).double().mean()
    distance = "" if found is reference else f"{sqnr([reference], [found]):.2f}"
    return {
        "perplexity": f"{loss.exp():.2f}",
        "kl": f"{kl:.4f}",
        "agreement": f"{same:.4f}",
        "sqnr": distance,
    }
