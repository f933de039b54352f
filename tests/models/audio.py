"""Recorded voice prompts of Debian packages and the signal processing that the models share."""

import math
import wave
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from tests.models.assets import debian_package

SAMPLE_RATE = 16_000

_RECORDED_RATE = SAMPLE_RATE // 2
_INT16_SCALE = 32_768
_SINC_REACH = 64
# Slaney's mel scale: linear up to 1 kHz, then 27 steps to each factor of 6.4.
_LINEAR_HZ_PER_MEL = 200 / 3
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27


def voice_prompts(language: str) -> list[Path]:
    """Returns the recordings of one speaker, sorted, those of silence left out.

    Args:
        language: one of en, es, fr, it and ru; each has a speaker of its own.

    Raises:
        AssetUnavailable: if the Debian package cannot be had.
    """
    package = debian_package(f"asterisk-core-sounds-{language}-wav")
    sounds = package / "usr" / "share" / "asterisk" / "sounds"
    names = sorted(str(path) for path in sounds.rglob("*.wav"))
    return [Path(name) for name in names if "silence" not in name]


def read_prompt(path: Path) -> Tensor:
    """Reads a recording of one channel at 8 kHz as samples from -1 to 1."""
    with wave.open(str(path)) as recording:
        form = (recording.getnchannels(), recording.getsampwidth(), recording.getframerate())
        if form != (1, 2, _RECORDED_RATE):
            raise ValueError(f"{path.name} is not 16 bit mono at {_RECORDED_RATE} Hz: {form}")
        frames = bytearray(recording.readframes(recording.getnframes()))
    if not frames:  # which one of the Debian recordings is, and `frombuffer` refuses
        return torch.empty(0)
    return torch.frombuffer(frames, dtype=torch.int16).float() / _INT16_SCALE


def double_rate(samples: Tensor) -> Tensor:
    """Resamples [T] at 8 kHz to [2 T] at 16 kHz with a windowed sinc."""
    spread = functional.pad(samples[:, None], (0, 1)).flatten()
    offsets = torch.arange(-_SINC_REACH, _SINC_REACH + 1, dtype=torch.float64)
    window = torch.hann_window(len(offsets), periodic=False, dtype=torch.float64)
    kernel = (torch.sinc(offsets / 2) * window).float()
    return functional.conv1d(spread[None, None], kernel[None, None], padding=_SINC_REACH)[0, 0]


def synthetic_voice(seconds: float, *, pitch: float = 140.0) -> Tensor:
    """Makes a tone that is voiced like speech, four syllables a second, at 16 kHz.

    Args:
        seconds: how long it lasts.
        pitch: its mean fundamental frequency in Hz.
    """
    time = torch.arange(int(seconds * SAMPLE_RATE), dtype=torch.float64) / SAMPLE_RATE
    phase = 2 * torch.pi * pitch * (time + 0.01 * torch.sin(2 * torch.pi * 1.5 * time))
    overtones = torch.arange(1, 21, dtype=torch.float64)[:, None]
    voiced = (torch.sin(overtones * phase) / overtones).sum(dim=0)
    loudness = torch.sin(torch.pi * 4 * time).square()
    return (0.1 * voiced * loudness).float()


def mel_filters(bands: int, *, window: int) -> Tensor:
    """Builds triangular filters of equal area, evenly spaced on Slaney's mel scale.

    Args:
        bands: how many filters.
        window: how many samples one Fourier transform spans.

    Returns:
        The weight of each frequency for each band, [bands, window / 2 + 1].
    """
    nyquist = SAMPLE_RATE / 2
    highest = _BREAK_MEL + math.log(nyquist / _BREAK_HZ) / _LOG_STEP
    mels = torch.linspace(0, highest, bands + 2, dtype=torch.float64)
    above_break = _BREAK_HZ * torch.exp(_LOG_STEP * (mels - _BREAK_MEL))
    edges = torch.where(mels < _BREAK_MEL, mels * _LINEAR_HZ_PER_MEL, above_break)
    lower, center, upper = (edges[start : start + bands, None] for start in range(3))
    frequencies = torch.linspace(0, nyquist, window // 2 + 1, dtype=torch.float64)
    rising = (frequencies - lower) / (center - lower)
    falling = (upper - frequencies) / (upper - center)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (upper - lower)).float()
