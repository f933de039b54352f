"""INT8 of recurrent models (LSTM, GRU, LSTMCell), by their own metrics, beside torch.ao's dynamic.

The speaker encoder is the hard one: the first input weight of its LSTM has a median magnitude of
0.16 and a maximum of 61, since it reads spectrograms that were not put on a logarithmic scale.
"""

from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor, nn

from mono_quant import Quantizer
from tests.benchmarks.dynamic_peers import TORCH, dynamic, engine
from tests.benchmarks.measure import print_table, sqnr
from tests.benchmarks.models import RealModel, real_model
from tests.models import AssetUnavailable, resemblyzer

OTHERS = ("g2p", "silero_vad", "textgenrnn")
KINDS = (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.Conv1d)
DYNAMIC = Quantizer().activations("dynamic")


FIRST = "lstm.weight_ih_l0"


def speaker_settings() -> Mapping[str, Quantizer]:
    """Return what is tried on the speaker encoder; what is fitted sees synthetic voices."""
    named = f'override("{FIRST}", bits=16)'
    synthetic = resemblyzer.sample_inputs()
    return {
        "dynamic": DYNAMIC,
        "dynamic, asymmetric weights": DYNAMIC.asymmetric(),
        "weights alone": Quantizer().activations(None),
        'dynamic, on_damage("keep")': DYNAMIC.on_damage("keep"),
        'dynamic, on_damage("keep"), fitted': DYNAMIC.on_damage("keep").fit([synthetic]),
        f"dynamic, {named}": DYNAMIC.override(FIRST, bits=16),
        f"dynamic, {named}, asymmetric weights": DYNAMIC.asymmetric().override(FIRST, bits=16),
        **{f"{title}, {named}": one.override(FIRST, bits=16) for title, one in fitted(synthetic)},
        "FP16": Quantizer().bits(16),
    }


def fitted(inputs: tuple[Tensor, ...]) -> Iterator[tuple[str, Quantizer]]:
    """Yield how inputs are quantized with data: static, and those of recurrent layers dynamic."""
    static = Quantizer().activations("static").fit([inputs])
    yield "static, fitted", static
    yield "the same, recurrent ones dynamic", static.override(is_recurrent, activations="dynamic")


def is_recurrent(name: str, module: nn.Module) -> bool:
    """Return whether a layer has steps."""
    return isinstance(module, nn.RNNBase | nn.RNNCellBase)


def chosen(name: str, module: nn.Module) -> bool:
    """Return whether a layer is quantized: all of them but embeddings."""
    return isinstance(module, KINDS)


def main() -> None:
    """Print the speaker encoder's table, then the others'."""
    print(f"{engine()}\n")
    try:
        speaker_encodings()
    except AssetUnavailable as reason:
        print(f"skipped: {reason}")
        return
    print("Resemblyzer's speaker encoder, on the prompts of five speakers:\n")
    columns = ("package", "setting", "SQNR, dB", "equal error rate", "speaker accuracy")
    print_table(columns, _speaker())
    print("torch.ao leaves convolutions in float, this package does not:\n")
    print_table(("model", "package", "setting", "metrics"), _others())


@cache
def speaker() -> nn.Module:
    """Return the float encoder."""
    return resemblyzer.load()


@cache
def speaker_encodings() -> Tensor:
    """Return the float encodings of all clips."""
    return encodings(speaker())


@torch.no_grad()
def encodings(model: nn.Module) -> Tensor:
    """Return a model's encodings of all clips, [300, 256]."""
    return torch.cat(
        [model(resemblyzer.speech_clips(language)) for language in resemblyzer.LANGUAGES]
    )


def _speaker() -> Iterator[tuple[str, ...]]:
    yield ("float", "", "", *_rates(speaker()))
    for found in dynamic(speaker(), chosen, speaker_settings(), TORCH):
        if found.model is None:
            yield (found.package, found.setting, found.reason, "", "")
            continue
        decibels = sqnr([speaker_encodings()], [encodings(found.model)])
        yield (found.package, found.setting, f"{decibels:.2f}", *_rates(found.model))


def _rates(model: nn.Module) -> tuple[str, str]:
    found = resemblyzer.evaluate(model)
    return f"{found['equal_error_rate']:.4f}", f"{found['speaker_accuracy']:.4f}"


def _others() -> Iterator[tuple[str, ...]]:
    for name in OTHERS:
        loader = real_model(name)
        try:
            model = loader.load()
            yield (name, "float", "", _metrics(loader, model))
        except AssetUnavailable as reason:
            yield (name, "", "", f"skipped: {reason}")
            continue
        ours = {"dynamic": DYNAMIC, **dict(fitted(loader.sample_inputs()))}
        for found in dynamic(model, chosen, ours, TORCH):
            shown = found.reason if found.model is None else _metrics(loader, found.model)
            yield (name, found.package, found.setting, shown)


def _metrics(loader: RealModel, model: nn.Module) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in loader.evaluate(model).items())
