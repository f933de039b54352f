"""Silero's voice activity detector for 16 kHz: five Conv1d, an LSTMCell and a 1x1 Conv1d.

Weights: the TorchScript file of silero-vad 6.2.3 (MIT), float32; the same package's safetensors
file holds other weights.  Speech: 60 English voice prompts of Debian with pauses
between them and faint noise over all; a frame counts as speech where the clean prompt is loud.
"""

import warnings
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models.assets import wheel_file
from tests.models.audio import SAMPLE_RATE, double_rate, read_prompt, synthetic_voice, voice_prompts

_FRAME = 512
_CONTEXT = 64
_WINDOW = 256
_FREQUENCIES = _WINDOW // 2 + 1
_WIDTH = 128
_PROMPTS = 60
_PAUSE = int(0.8 * SAMPLE_RATE)
_NOISE = 0.01
_SPEECH_DB = -35.0


class VoiceDetector(nn.Module):
    """Says for each 32 ms of sound how likely someone speaks."""

    def __init__(self) -> None:
        """Builds the detector with random weights."""
        super().__init__()
        self.transform = nn.Conv1d(1, 2 * _FREQUENCIES, _WINDOW, stride=_WINDOW // 2, bias=False)
        self.encoder = nn.ModuleList(
            [
                nn.Conv1d(_FREQUENCIES, _WIDTH, 3, padding=1),
                nn.Conv1d(_WIDTH, _WIDTH // 2, 3, stride=2, padding=1),
                nn.Conv1d(_WIDTH // 2, _WIDTH // 2, 3, stride=2, padding=1),
                nn.Conv1d(_WIDTH // 2, _WIDTH, 3, padding=1),
            ]
        )
        self.memory = nn.LSTMCell(_WIDTH, _WIDTH)
        self.output = nn.Conv1d(_WIDTH, 1, 1)

    def forward(self, samples: Tensor) -> Tensor:
        """Returns the probability of speech [B, frames] in frames of 512 samples [B, T]."""
        unfinished = -samples.shape[1] % _FRAME
        # Each frame is seen together with the last samples of the one before it.
        padded = functional.pad(samples, (_CONTEXT, unfinished))
        frames = padded.unfold(1, _CONTEXT + _FRAME, _FRAME)
        batch, count, length = frames.shape
        features = self._features(frames.reshape(batch * count, length)).view(batch, count, -1)
        state = (features.new_zeros(batch, _WIDTH), features.new_zeros(batch, _WIDTH))
        probabilities = []
        for index in range(count):
            state = self.memory(features[:, index], state)
            logit = self.output(torch.relu(state[0]).unsqueeze(-1))
            probabilities.append(torch.sigmoid(logit).flatten(1))
        return torch.cat(probabilities, dim=1)

    def _features(self, frames: Tensor) -> Tensor:
        reflected = functional.pad(frames, (0, _CONTEXT), mode="reflect")
        real, imaginary = self.transform(reflected.unsqueeze(1)).split(_FREQUENCIES, dim=1)
        features = (real.square() + imaginary.square()).sqrt()
        for convolution in self.encoder:
            features = torch.relu(convolution(features))
        flat: Tensor = features.squeeze(-1)
        return flat


def load() -> VoiceDetector:
    """Builds the detector with its published weights, in evaluation mode."""
    archive = wheel_file("silero-vad", "6.2.3", "silero_vad/data/silero_vad.jit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.load(archive, map_location="cpu")  # type: ignore[no-untyped-call]  # torch
    published = scripted.state_dict()
    names = {
        "stft.forward_basis_buffer": "transform.weight",
        "decoder.decoder.2.weight": "output.weight",
        "decoder.decoder.2.bias": "output.bias",
    }
    for kind in ("weight", "bias"):
        for index in range(4):
            names[f"encoder.{index}.reparam_conv.{kind}"] = f"encoder.{index}.{kind}"
        for side in ("ih", "hh"):
            names[f"decoder.rnn.{kind}_{side}"] = f"memory.{kind}_{side}"
    state = {ours: published[f"_model.{theirs}"] for theirs, ours in names.items()}
    model = VoiceDetector()
    model.load_state_dict(state)
    return model.eval()


def sample_inputs() -> tuple[Tensor, ...]:
    """Returns two seconds of sound, a synthetic voice in the second one, [1, 32000]."""
    return (torch.cat((torch.zeros(SAMPLE_RATE), synthetic_voice(1.0)))[None],)


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Measures how well a detector finds the frames with speech.

    Args:
        model: the detector, or a quantized form of it.

    Returns:
        The area under the ROC curve and the accuracy at a probability of a half, over frames.
    """
    samples, spoken = noisy_prompts()
    probabilities: Tensor = model(samples[None])[0]
    ranks = torch.empty(len(probabilities), dtype=torch.float64)
    ranks[probabilities.argsort()] = torch.arange(1, len(probabilities) + 1, dtype=torch.float64)
    positives = int(spoken.sum())
    negatives = len(spoken) - positives
    above = ranks[spoken].sum().item() - positives * (positives + 1) / 2
    return {
        "frame_auc": above / (positives * negatives),
        "frame_accuracy": ((probabilities > 0.5) == spoken).double().mean().item(),
    }


@cache
def noisy_prompts() -> tuple[Tensor, Tensor]:
    """Returns joined prompts under noise [T] and which of their frames hold speech [T / 512]."""
    prompts = voice_prompts("en")
    chosen = prompts[:: len(prompts) // _PROMPTS][:_PROMPTS]
    pieces = [functional.pad(double_rate(read_prompt(path)), (0, _PAUSE)) for path in chosen]
    clean = torch.cat(pieces)
    clean = clean[: len(clean) // _FRAME * _FRAME]
    loudness = clean.view(-1, _FRAME).square().mean(dim=1).sqrt()
    spoken = loudness > loudness.max() * 10 ** (_SPEECH_DB / 20)
    noise = torch.randn(len(clean), generator=torch.Generator().manual_seed(0))
    return clean + _NOISE * noise, spoken
