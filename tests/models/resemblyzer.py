"""Resemblyzer's speaker encoder: three LSTM layers and a Linear, in float32.

Weights: Resemblyzer 0.1.4 (Apache-2.0).  Speech: the voice prompts of five Debian packages
(CC-BY-SA 3.0 and CC-BY 3.0).  Each speaker has a language and a recording chain of their own,
which makes identification easy; the equal error rate is the more sensitive of the metrics.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models.assets import wheel_file
from tests.models.audio import (
    SAMPLE_RATE,
    double_rate,
    mel_filters,
    read_prompt,
    synthetic_voice,
    voice_prompts,
)

LANGUAGES = ("en", "es", "fr", "it", "ru")

_BANDS = 40
_WIDTH = 256
_LAYERS = 3
_WINDOW = 400
_HOP = 160
_LOUDNESS_DB = -30.0
_CLIP_SECONDS = 1.6
_CLIP_FRAMES = 160
_CLIPS = 60
_ENROLLED = 10
_THRESHOLDS = 2000


class SpeakerEncoder(nn.Module):
    """Encodes speech as unit vectors that lie close together for the same speaker."""

    def __init__(self) -> None:
        """Builds the encoder with random weights."""
        super().__init__()
        self.lstm = nn.LSTM(_BANDS, _WIDTH, num_layers=_LAYERS, batch_first=True)
        self.linear = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, mel: Tensor) -> Tensor:
        """Encodes mel spectrograms [B, T, 40] as [B, 256]."""
        _, (hidden, _) = self.lstm(mel)
        return functional.normalize(torch.relu(self.linear(hidden[-1])), dim=1)


def load() -> SpeakerEncoder:
    """Builds the encoder with its published weights, in evaluation mode."""
    weights = wheel_file("Resemblyzer", "0.1.4", "resemblyzer/pretrained.pt")
    published = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
    model = SpeakerEncoder()
    # The rest is a scale and an offset of the similarities that training alone uses.
    model.load_state_dict({name: published[name] for name in model.state_dict()})
    return model.eval()


def sample_inputs() -> tuple[Tensor, ...]:
    """Returns the spectrograms of four synthetic voices, [4, 160, 40]."""
    voices = (synthetic_voice(_CLIP_SECONDS, pitch=pitch) for pitch in (95.0, 130.0, 180.0, 240.0))
    return (torch.stack([mel_spectrogram(voice)[:_CLIP_FRAMES] for voice in voices]),)


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Measures how well the encodings tell the five speakers apart.

    Args:
        model: the encoder, or a quantized form of it.

    Returns:
        The share of the clips nearest to their own speaker's mean, and the equal error rate of
        telling whether two clips are of the same speaker.
    """
    means, tested = [], []
    for language in LANGUAGES:
        encodings: Tensor = model(speech_clips(language))
        means.append(encodings[:_ENROLLED].mean(dim=0))
        tested.append(encodings[_ENROLLED:])
    speakers = torch.arange(len(LANGUAGES)).repeat_interleave(torch.tensor(list(map(len, tested))))
    clips = torch.cat(tested)
    nearest = (clips @ functional.normalize(torch.stack(means), dim=1).T).argmax(dim=1)
    first, second = torch.triu_indices(len(clips), len(clips), offset=1).unbind()
    scores = (clips @ clips.T)[first, second]
    return {
        "speaker_accuracy": (nearest == speakers).double().mean().item(),
        "equal_error_rate": _equal_error_rate(scores, speakers[first] == speakers[second]),
    }


@cache
def speech_clips(language: str) -> Tensor:
    """Returns the spectrograms of 60 prompts of one speaker, [60, 160, 40].

    Args:
        language: the speaker's language, one of `LANGUAGES`.
    """
    clip_length = int(_CLIP_SECONDS * SAMPLE_RATE / 2)
    trimmed = (_without_lead(read_prompt(path)) for path in voice_prompts(language))
    long_enough = [samples[:clip_length] for samples in trimmed if len(samples) > clip_length]
    chosen = long_enough[:: max(1, len(long_enough) // _CLIPS)][:_CLIPS]
    return torch.stack([mel_spectrogram(double_rate(clip))[:_CLIP_FRAMES] for clip in chosen])


def mel_spectrogram(samples: Tensor) -> Tensor:
    """Returns the power in 40 bands, [frames, 40], of 16 kHz samples [T] made loud enough."""
    level = samples.square().mean().sqrt().clamp(min=1e-6)
    gain = (10 ** (_LOUDNESS_DB / 20) / level).clamp(min=1)
    spectrum = torch.stft(
        samples * gain,
        _WINDOW,
        _HOP,
        window=torch.hann_window(_WINDOW),
        pad_mode="constant",
        return_complex=True,
    )
    return (mel_filters(_BANDS, window=_WINDOW) @ spectrum.abs().square()).T


def _without_lead(samples: Tensor) -> Tensor:
    """Cuts the start off that holds the first hundredth of a recording's sound."""
    heard = samples.abs().cumsum(0)
    return samples[heard > 0.01 * samples.abs().sum()]


def _equal_error_rate(scores: Tensor, same: Tensor) -> float:
    """The error rate at the threshold where false rejections are as common as acceptances."""
    thresholds = scores.sort().values[:: max(1, len(scores) // _THRESHOLDS)].contiguous()
    accepted_same = _shares_at_least(scores[same], thresholds)
    accepted_other = _shares_at_least(scores[~same], thresholds)
    rejected_same = 1 - accepted_same
    best = (rejected_same - accepted_other).abs().argmin()
    return ((rejected_same[best] + accepted_other[best]) / 2).item()


def _shares_at_least(scores: Tensor, thresholds: Tensor) -> Tensor:
    below = torch.searchsorted(scores.sort().values, thresholds)
    return 1 - below.double() / len(scores)
