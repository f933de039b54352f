"""Processes killed while they save, quantize in place and calibrate: nothing is ever lost."""

import functools
import itertools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import attrs
import pytest
import torch
from torch import nn

from mono_quant import (
    GPTQ,
    QuantizationResult,
    Quantizer,
    load_model,
    save_model,
)
from tests.endurance.nursery import Nursery, job, main
from tests.helpers import noise, same_tensors

DATA = [noise(8, 64, seed=place) for place in range(3)]


def network(seed: int) -> nn.Sequential:
    """Return a model of some 1 MB, so that writing it takes a while."""
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(*layers, nn.Linear(64, 4096)).eval()


@functools.cache
def result(seed: int) -> "QuantizationResult[nn.Sequential]":
    """Return one of two models to save, quantized."""
    return Quantizer().bits(8).activations(None).apply(network(seed))


@job
def save_again_and_again(path: str, first: str) -> None:
    """Save two models in turn over one file, until killed."""
    for seed in itertools.count(int(first)):
        result(seed % 2).save(path)


@job
def save_once(path: str, seed: str) -> None:
    """Save one of the two models."""
    result(int(seed)).save(path)


@job
def save_in_turns(path: str, seed: str, times: str) -> None:
    """Save one of the two models again and again."""
    for _ in range(int(times)):
        result(int(seed)).save(path)


@job
def quantize_in_place(path: str) -> None:
    """Load float weights, quantize them in place, and save the result."""
    model = network(0)
    model.load_state_dict(torch.load(f"{path}.float", weights_only=True))
    Quantizer().bits(4).fit(DATA).apply_(model).save(path)


@job
def calibrate(folder: str, path: str) -> None:
    """Quantize block after block, keeping those that are finished, and save."""
    sequential().apply(network(0), resume=folder).save(path)


@job
def save_as_nobody(path: str) -> None:
    """Save without the rights of the super-user, which no folder refuses."""
    if os.geteuid() == 0:
        os.setuid(65534)
    with pytest.raises(PermissionError, match=re.escape(path)):
        result(0).save(path)


def sequential() -> Quantizer:
    """Return what is quantized block after block, and takes a moment for each."""
    return Quantizer().bits(4).only("*").rounding(GPTQ()).fit(DATA)


@attrs.frozen
class Survived:
    """What was left by kills.

    Attributes:
        kills: how many processes were killed.
        old: after how many the file was the one before.
        new: after how many it was another whole one.
        left: after how many something was left beside it, for the next one to remove.
    """

    kills: int
    old: int
    new: int
    left: int


def kill_while_saving(nursery: Nursery, folder: Path, suffix: str, kills: int) -> Survived:
    """Kill processes at random moments while they save two models in turn over one file.

    The file must be one of the two, whole, after each kill, and nothing may stay beside it after
    the next save.
    """
    path, random = folder / f"model{suffix}", Random(kills)
    result(0).save(path)
    before, new, left = 0, 0, 0
    for number in range(kills):
        child = nursery.start("save_again_and_again", path, number + 1)
        time.sleep(random.uniform(0, 0.15))
        assert child.kill() == -9
        loaded = load_model(path, network(2))
        now = next(seed for seed in (0, 1) if same_tensors(loaded, result(seed).model))
        new += now != before
        before = now
        left += len(list(folder.iterdir())) > 1
    result(0).save(path)
    assert list(folder.iterdir()) == [path]
    return Survived(kills, kills - new, new, left)


def kill_while_quantizing_in_place(nursery: Nursery, folder: Path, kills: int) -> Survived:
    """Kill processes that quantize in place: both files are what they were, or the new is whole."""
    path = folder / "model.safetensors"
    source = folder / "model.safetensors.float"
    torch.save(network(0).state_dict(), source)
    floats, random, new, left = source.read_bytes(), Random(kills), 0, 0
    whole = Quantizer().bits(4).fit(DATA).apply_(network(0)).model
    save_model(result(1).model, path)
    took = _seconds(nursery, "quantize_in_place", path)
    save_model(result(1).model, path)
    for number in range(kills):
        child = nursery.start("quantize_in_place", path)
        time.sleep(random.uniform(0, took) * number / kills)  # the first one at once
        child.kill()
        assert source.read_bytes() == floats
        loaded = load_model(path, network(2))
        finished = same_tensors(loaded, whole)
        assert finished or same_tensors(loaded, result(1).model)
        new += finished
        left += len(list(folder.iterdir())) > 2
        save_model(result(1).model, path)
        assert sorted(folder.iterdir()) == [path, source]
    return Survived(kills, kills - new, new, left)


def kill_while_calibrating(nursery: Nursery, folder: Path, runs: int) -> Survived:
    """Kill sequential calibrations at random moments until each is through: the bytes are the same.

    Those of a run that nobody disturbed.
    """
    whole, random = folder / "whole.pt", Random(runs)
    _seconds(nursery, "calibrate", folder / "first", whole)  # what only a first run has to find out
    took = _seconds(nursery, "calibrate", folder / "undisturbed", whole)
    kills, left = 0, 0
    for number in range(runs):
        patience = took
        blocks, path = folder / f"blocks{number}", folder / f"resumed{number}.pt"
        while True:
            child = nursery.start("calibrate", blocks, path)
            time.sleep(random.uniform(0.1, 0.7) * patience)
            patience *= 1.1  # a machine that got slower must not keep it from ending
            if child.kill() == 0:  # it was through already
                break
            kills += 1
            assert not path.exists() or path.read_bytes() == whole.read_bytes()
            left += any(blocks.glob(".*"))
        assert path.read_bytes() == whole.read_bytes()
        assert not list(blocks.iterdir())
    return Survived(kills, 0, runs, left)


def _seconds(nursery: Nursery, name: str, *arguments: object) -> float:
    start = time.monotonic()
    assert nursery.start(name, *arguments).wait() == 0
    return time.monotonic() - start


def save_at_once(nursery: Nursery, folder: Path, times: int) -> int:
    """Have two processes save two models to one path; return how often it was read meanwhile.

    Whatever is there at any moment is one of the two, whole.
    """
    path = folder / "model.pt"
    result(0).save(path)
    writers = [nursery.start("save_in_turns", path, seed, times) for seed in (0, 1)]
    reads, found = 0, set[int]()
    while _alive(writers[0].pid) or _alive(writers[1].pid):
        loaded = load_model(path, network(2))
        found.add(next(seed for seed in (0, 1) if same_tensors(loaded, result(seed).model)))
        reads += 1
    assert [writer.wait() for writer in writers] == [0, 0]
    assert found == {0, 1}
    assert list(folder.iterdir()) == [path]
    return reads


def _alive(pid: int) -> bool:
    """Return whether a process still runs: one that ended is there until it is waited for."""
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


KINDS: dict[str, Callable[..., Survived]] = {
    "saving .safetensors": functools.partial(kill_while_saving, suffix=".safetensors"),
    "saving .pt": functools.partial(kill_while_saving, suffix=".pt"),
    "quantizing in place": kill_while_quantizing_in_place,
}

if __name__ == "__main__":
    for each in (0, 1):
        result(each)
    main()
