"""Data: what is taken for batches, how a model is called with one, and what is measured on it."""

import copy
import math
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from mono_quant import (
    CalibrationError,
    Grid,
    InputError,
    LinearQuantizer,
    QTensor,
    QuantizationResult,
    Quantizer,
    Rounding,
    Statistic,
    Statistics,
)
from mono_quant.base import AnyStatistic
from mono_quant.calibration import CalibrationData, Kept
from mono_quant.numerics.nested import tensors_in
from tests.helpers import WEIGHTS_ONLY, noise, same_bits, same_tensors, sqnr64


class Net(nn.Module):
    """Two layers that say what they were called with."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 32)
        self.head = nn.Linear(32, 8)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        found: Tensor = self.head(torch.relu(self.body(x)))
        return found


class Pair(nn.Module):
    """Takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = self.layer(x) + self.layer(y)
        return found


class Noisy(nn.Module):
    """Behaves otherwise in training: dropout, and a norm with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 32)
        self.norm = nn.BatchNorm1d(32)
        self.drop = nn.Dropout(0.9)
        self.head = nn.Linear(32, 8)
        self.grads: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.grads.append(torch.is_grad_enabled())
        found: Tensor = self.head(self.drop(self.norm(self.body(x))))
        return found


class Texts(Dataset[Mapping[str, Tensor]]):
    """Samples that are mappings, as those of tokenizers."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, place: int) -> Mapping[str, Tensor]:
        return {"x": noise(16, seed=place), "y": noise(16, seed=place + 100)}


class Stream(IterableDataset[Tensor]):
    """Samples without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        return (noise(16, seed=place) for place in range(40))


ROWS = noise(40, 16)


class Rows(Dataset[Tensor]):
    """Samples that are tensors, without a tuple around them."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, place: int) -> Tensor:
        return ROWS[place]


def pieces(x: Tensor, size: int) -> list[Tensor]:
    """Return batches of a size."""
    return list(torch.split(x, size))


KINDS: dict[str, tuple[object, list[int]]] = {
    "a tensor": (ROWS, [40]),
    "a list of tensors": ([ROWS[:10], ROWS[10:]], [10, 30]),
    "a tuple of arguments": ((ROWS,), [40]),
    "a list of tuples": ([(ROWS[:10],), (ROWS[10:],)], [10, 30]),
    "a list of lists": ([[ROWS[:10]], [ROWS[10:]]], [10, 30]),
    "a list of dicts": ([{"x": ROWS[:10]}, {"x": ROWS[10:]}], [10, 30]),
    "a dict": ({"x": ROWS}, [40]),
    "a dataset": (TensorDataset(ROWS), [32, 8]),
    "a dataset with labels": (TensorDataset(ROWS, torch.arange(40)), [32, 8]),
    "a stream": (Stream(), [32, 8]),
    "a loader": (DataLoader(TensorDataset(ROWS), batch_size=15), [15, 15, 10]),
    "a loader of tensors": (DataLoader(Rows(), batch_size=30), [30, 10]),
}


def measured(source: nn.Module, data: object, samples: int = 150) -> QuantizationResult[nn.Module]:
    """Return the result of 4 bits, every layer quantized, measured on the data."""
    return Quantizer().bits(4).only("*").fit(data, samples=samples).apply(source)


@pytest.mark.parametrize(("data", "sizes"), KINDS.values(), ids=KINDS)
def test_each_kind_of_data_is_gone_through_batch_by_batch(data: object, sizes: list[int]) -> None:
    source = Net().eval()
    result = measured(source, data)
    assert result.model.seen == sizes
    assert not source.seen, "its twin runs, to measure layers"
    assert result.report.samples == 40
    assert result.report.output_sqnr_db is not None


@pytest.mark.parametrize(("data", "sizes"), KINDS.values(), ids=KINDS)
def test_the_output_sqnr_is_that_of_an_independent_computation(
    data: object, sizes: list[int]
) -> None:
    source = Net().eval()
    result = measured(source, data)
    rows = torch.stack(list(Stream())) if isinstance(data, Stream) else ROWS
    with torch.no_grad():
        expected = sqnr64([source(rows)], [result.model(rows)])
    assert result.report.output_sqnr_db == pytest.approx(expected, abs=1e-3)


def test_a_loader_of_dicts_is_called_by_name() -> None:
    source = Pair().eval()
    result = measured(source, DataLoader(Texts(), batch_size=16))
    assert result.report.samples == 40
    samples = [Texts()[place] for place in range(40)]
    x, y = (torch.stack([sample[name] for sample in samples]) for name in ("x", "y"))
    with torch.no_grad():
        expected = sqnr64([source(x, y)], [result.model(x, y)])
    assert result.report.output_sqnr_db == pytest.approx(expected, abs=1e-3)


def test_a_dataset_of_dicts_is_batched() -> None:
    assert measured(Pair().eval(), Texts()).report.samples == 40


def test_what_forward_has_no_parameter_for_is_left_out_with_a_note() -> None:
    result = measured(Net().eval(), DataLoader(TensorDataset(ROWS, torch.arange(40))))
    [note] = [note for note in result.report.notes if "left out" in note]
    assert "the last 1 of 2 items" in note
    assert "taken for labels" in note


def test_a_tuple_that_may_be_several_batches_is_refused() -> None:
    several = torch.split(ROWS, 10)  # a tuple
    with pytest.raises(
        InputError, match=r"tuple of 4 items.*forward takes 1.*fit\(list\(batches\)\)"
    ):
        Quantizer().fit(several).plan(Net().eval())
    assert Quantizer().fit(list(several)).apply(Net().eval()).report.samples == 40
    assert Quantizer().fit((ROWS, ROWS)).apply(Pair().eval()).report.samples == 40


def test_nothing_is_left_out_where_forward_takes_all() -> None:
    result = measured(Pair().eval(), [(ROWS, ROWS)])
    assert not [note for note in result.report.notes if "left out" in note]


@pytest.mark.parametrize(
    ("samples", "batches"), [(1, 1), (10, 1), (11, 2), (20, 2), (39, 4), (40, 4), (1000, 4)]
)
def test_a_cap_on_samples_stops_after_the_batch_that_reaches_it(samples: int, batches: int) -> None:
    source = Net().eval()
    result = measured(source, pieces(ROWS, 10), samples=samples)
    assert result.model.seen == [10] * batches
    assert result.report.samples == 10 * batches


def test_the_cap_is_150_by_default() -> None:
    source = Net().eval()
    result = Quantizer().fit([noise(50, 16)] * 10).apply(source)
    assert result.report.samples == 150


@pytest.mark.parametrize("samples", [0, -1])
def test_a_cap_of_none_is_refused(samples: int) -> None:
    with pytest.raises(InputError, match="samples is 1 or more"):
        Quantizer().fit(ROWS, samples=samples)


def generated() -> Iterator[Tensor]:
    yield ROWS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (generated(), "only once"),
        (iter([ROWS]), "only once"),
        (map(torch.relu, [ROWS]), "only once"),
        (zip([ROWS], [ROWS], strict=True), "only once"),
        ("a file name", "a str holds no batches"),
        (b"bytes", "a bytes holds no batches"),
        (3, "a int holds no batches"),
        (None, "a NoneType holds no batches"),
        ([], "the data is empty"),
        ((), "the data is empty"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value[:10],
)
def test_data_that_cannot_be_used_is_refused_at_once(data: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Quantizer().fit(data)


@pytest.mark.parametrize(
    "data",
    [DataLoader(TensorDataset(ROWS[:0])), TensorDataset(ROWS[:0]), [ROWS[:0]], ROWS[:0], [[]]],
    ids=["loader", "dataset", "batch", "tensor", "list"],
)
def test_data_without_a_sample_is_refused_when_it_runs(data: object) -> None:
    with pytest.raises((InputError, CalibrationError)):
        measured(Net().eval(), data)


class Broken(Rows):
    """Cannot read one sample."""

    def __getitem__(self, place: int) -> Tensor:
        if place == 35:
            raise KeyError("no such picture")
        return super().__getitem__(place)


def test_the_item_of_a_dataset_that_cannot_be_read_is_named() -> None:
    message = r"^item 35 of the Broken cannot be read: KeyError: 'no such picture'$"
    with pytest.raises(CalibrationError, match=message) as caught:
        measured(Net().eval(), Broken())
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (DataLoader(Broken(), batch_size=10), KeyError),
        (DataLoader([ROWS[0], ROWS[1, :3]], batch_size=2), RuntimeError),  # type: ignore[arg-type]  # a list is a dataset to a loader
    ],
    ids=["reading", "stacking"],
)
def test_the_batch_of_a_loader_that_cannot_be_read_is_named(
    data: object, cause: type[Exception]
) -> None:
    place = 3 if cause is KeyError else 0
    with pytest.raises(CalibrationError, match=f"^batch {place} of the data cannot be") as caught:
        measured(Net().eval(), data)
    assert isinstance(caught.value.__cause__, cause)


def read_only(x: Tensor) -> object:
    """Return an array that cannot be written, as those of memory maps."""
    array = x.numpy().copy()
    array.flags.writeable = False
    return array


ARRAYS: dict[str, object] = {
    "an array": ROWS.numpy(),
    "a list": [ROWS[:10].numpy(), ROWS[10:].numpy()],
    "a list of tuples": [(ROWS[:10].numpy(),), (ROWS[10:].numpy(), [1, 2])],
    "a list of dicts": [{"x": ROWS[:10].numpy()}, {"x": ROWS[10:].numpy()}],
    "read-only": [read_only(ROWS)],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("data", ARRAYS.values(), ids=ARRAYS)
def test_arrays_of_numpy_are_taken_for_tensors(data: object) -> None:
    torch.manual_seed(0)
    source = Net().eval()
    found, expected = measured(source, data).report, measured(source, ROWS).report
    assert found.samples == 40
    assert found.output_sqnr_db == pytest.approx(expected.output_sqnr_db)


def test_an_array_that_no_tensor_can_hold_is_refused_with_the_call_that_makes_one() -> None:
    words = ROWS.numpy().astype(str)
    message = r"an array that no tensor can hold: .*; give a tensor, as torch\.from_numpy\(array\)"
    with pytest.raises(InputError, match=message):
        measured(Net().eval(), [words])


WIDE: dict[str, object] = {
    "a tensor": [ROWS, ROWS.double()],
    "an array": [ROWS, ROWS.double().numpy()],
    "a tuple": [ROWS, (ROWS.double(),)],
    "a mapping": [ROWS, {"x": ROWS.double()}],
}


@pytest.mark.parametrize("data", WIDE.values(), ids=WIDE)
def test_data_of_another_dtype_is_refused_with_both_and_the_call_that_converts(
    data: object,
) -> None:
    message = (
        r"^batch 1 of the data is float64, and Net float32; convert it, a tensor with "
        r"x\.to\(torch\.float32\) and an array of numpy with "
        r"torch\.from_numpy\(x\)\.to\(torch\.float32\) \(.*dtype.*\)$"
    )
    with pytest.raises(CalibrationError, match=message):
        measured(Net().eval(), data)


def test_an_example_of_another_dtype_is_refused_alike() -> None:
    result = measured(Net().eval(), ROWS)
    with pytest.raises(CalibrationError, match="batch 0 of the data is float64, and Net float32"):
        result.benchmark(ROWS.double(), seconds=0.01)


def test_a_model_that_takes_another_dtype_is_given_it() -> None:
    class Converting(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    torch.manual_seed(0)
    source = Converting().eval()
    found, expected = (measured(source, x).report for x in (ROWS.double(), ROWS))
    assert found.output_sqnr_db == expected.output_sqnr_db


def test_failures_of_another_kind_are_not_put_down_to_the_dtype() -> None:
    with pytest.raises(CalibrationError, match=r"Net failed on batch 0 of the data: .*shapes"):
        measured(Net().eval(), ROWS[:, :3])


@pytest.mark.parametrize("data", [ROWS.tolist(), [{"x": [1.0, 2.0]}], [0.5]], ids=str)
def test_numbers_that_lie_in_no_tensor_are_refused_with_the_call_that_makes_one(
    data: object,
) -> None:
    message = r"of numbers without a tensor; give tensors, as torch\.tensor\(numbers\) makes one"
    with pytest.raises(CalibrationError, match=message):
        measured(Net().eval(), data)


def test_a_forward_of_the_users_gets_arrays_as_they_came() -> None:
    given: list[object] = []

    def forward(model: nn.Module, batch: object) -> object:
        given.append(batch)
        return model(ROWS)

    array = ROWS.numpy()
    Quantizer().fit([array], forward=forward).apply(Net().eval())
    assert given
    assert all(batch is array for batch in given)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_batch_with_nan_is_named_before_the_model_runs(in_place: bool) -> None:
    bad = ROWS.clone()
    bad[25, 3] = torch.nan
    source = Net().eval()
    quantizer = Quantizer().fit(pieces(bad, 10))
    with pytest.raises(CalibrationError, match="batch 2 of the data holds NaN"):
        (quantizer.apply_ if in_place else quantizer.apply)(source)
    assert type(source.body) is nn.Linear


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_fails_names_the_batch_and_says_how_to_call_it_otherwise(
    in_place: bool,
) -> None:
    quantizer = Quantizer().fit([ROWS, ROWS[:, :3]])
    source = Net().eval()
    with pytest.raises(CalibrationError, match=r"Net failed on batch 1.*forward=lambda") as caught:
        (quantizer.apply_ if in_place else quantizer.apply)(source)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert type(source.body) is nn.Linear


def test_a_model_that_returns_no_floating_tensor_is_refused() -> None:
    class Arg(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    with pytest.raises(CalibrationError, match="Arg returned no floating tensor"):
        measured(Arg().eval(), ROWS)


def test_a_forward_of_the_users_is_called_instead() -> None:
    source = Net().eval()
    calls: list[object] = []

    def forward(model: nn.Module, batch: object) -> object:
        calls.append(batch)
        assert isinstance(batch, list)
        return {"ignored": 3, "wanted": model(batch[0] @ batch[1])}

    x, y = noise(5, 4, seed=1), noise(4, 16, seed=2)
    WEIGHTS_ONLY.fit([[x, y]], forward=forward).apply(source)
    assert len(calls) == 2, "once for each model"
    result = Quantizer().fit([[x, y]], forward=forward).apply(source)
    assert len(calls) == 2 + 3, "once more to calibrate"
    with torch.no_grad():
        expected = sqnr64([source(x @ y)], [result.model(x @ y)])
    assert result.report.output_sqnr_db == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_runs_in_eval_without_gradients_and_gets_its_mode_back(
    in_place: bool, training: bool
) -> None:
    source = Noisy().train(training)
    source.drop.eval()
    state = copy.deepcopy(source.norm.state_dict())
    quantizer = Quantizer().fold(False).fit([ROWS, ROWS])
    result = (quantizer.apply_ if in_place else quantizer.apply)(source)
    for model in (source, result.model):
        assert model.training is training
        assert model.body.training is training
        assert not model.drop.training
        assert not any(model.grads)
        assert all(same_bits(state[name], model.norm.state_dict()[name]) for name in state)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled(), "gradients were left turned off"


def test_dropout_does_not_disturb_the_measure() -> None:
    source = Noisy().train()
    first = measured(source, ROWS).report.output_sqnr_db
    second = measured(source.eval(), ROWS).report.output_sqnr_db
    assert first == second


def test_the_mode_is_restored_after_a_failure() -> None:
    source = Noisy().train()
    with pytest.raises(CalibrationError):
        measured(source, [ROWS, ROWS[:, :3]])
    assert source.training
    assert source.drop.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("data", [ROWS, pieces(ROWS, 7), TensorDataset(ROWS)])
@pytest.mark.parametrize("in_memory", [True, False])
def test_in_place_measures_the_same(
    data: object, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.setattr("mono_quant.plan.plan.Kept", partial(Kept, limit=0))
    quantizer = Quantizer().bits(4).only("*").fit(data)
    source = Net().eval()
    apart = quantizer.apply(source)
    in_place = quantizer.apply_(source)
    assert in_place.report.output_sqnr_db == apart.report.output_sqnr_db
    assert in_place.report.samples == apart.report.samples == 40
    assert same_tensors(apart.model, in_place.model)


@pytest.mark.parametrize("limit", [0, 100, 1000, 10**9])
def test_outputs_come_back_as_they_were_whatever_is_spilled(limit: int) -> None:
    kept = Kept(limit=limit)
    batches = [[noise(4, 8, seed=place), noise(2, seed=place).bfloat16()] for place in range(5)]
    for outputs in batches:
        kept.add(outputs)
    for _ in range(2):
        for found, expected in zip(kept, batches, strict=True):
            assert all(same_bits(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_spilled_outputs_have_no_name_and_are_gone_when_they_are_done_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a process that is killed leaves nothing behind."""

    def spilled() -> list[str]:
        files = [one for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
        names = [str(one.readlink()) for one in files]
        return [name for name in names if name.startswith(str(tmp_path))]

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = Kept(limit=0)
    kept.add([noise(4)])
    assert [name.endswith(" (deleted)") for name in spilled()] == [True]
    assert not list(tmp_path.iterdir())
    del kept
    assert not spilled()


def test_outputs_in_memory_are_copies() -> None:
    kept, buffer = Kept(), torch.zeros(3)
    kept.add([buffer])
    buffer.fill_(7)
    assert not next(iter(kept))[0].any()


def test_a_model_that_reuses_its_output_is_measured_right() -> None:
    class Reusing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("out", torch.empty(10, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.get_buffer("out").copy_(super().forward(x))

    source = Reusing().eval()
    data = pieces(ROWS, 10)
    apart = measured(source, data).report.output_sqnr_db
    plain = Net().eval()
    plain.load_state_dict(source.state_dict(), strict=False)
    assert apart == measured(plain, data).report.output_sqnr_db
    quantizer = Quantizer().bits(4).only("*").fit(data)
    assert quantizer.apply_(source).report.output_sqnr_db == apart


class Counting(Net):
    """Its output depends on how often it was called, and it caches what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", None)
        self.register_buffer("replaced", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        calls = self.get_buffer("calls").add_(1)
        self.cache = x
        self.replaced = torch.ones(3)
        return super().forward(x) * calls


@pytest.mark.parametrize("in_place", [False, True])
def test_buffers_that_a_forward_writes_are_put_back(in_place: bool) -> None:
    source = Counting().eval()
    data = pieces(ROWS, 10)
    quantizer = Quantizer().bits(4).only("*").fit(data)
    result = (quantizer.apply_ if in_place else quantizer.apply)(source)
    assert result.validate(ROWS)
    for model in (source, result.model):
        assert dict(model.named_buffers()).keys() >= {"calls", "replaced"}
        assert model.get_buffer("calls") == 0
        assert not model.get_buffer("replaced").any()
        assert model._buffers["cache"] is None


def test_in_place_measures_a_model_with_a_state_as_apply_does() -> None:
    source = Counting().eval()
    quantizer = Quantizer().bits(4).only("*").fit(pieces(ROWS, 10))
    apart = quantizer.apply(source).report.output_sqnr_db
    assert quantizer.apply_(source).report.output_sqnr_db == apart


def test_a_model_that_writes_into_its_input_sees_the_same_data_twice() -> None:
    class Writing(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(3).add_(1))

    source, data = Writing().eval(), ROWS.clone()
    result = measured(source, data)
    assert same_bits(data, ROWS), "the user's data was written to"
    with torch.no_grad():
        expected = sqnr64([source(ROWS.clone())], [result.model(ROWS.clone())])
    assert result.report.output_sqnr_db == pytest.approx(expected, abs=1e-3)


def test_a_loader_that_shuffles_gives_both_models_the_same_batches() -> None:
    """Else the error would be that between different inputs."""
    source = Net().eval()
    loader = DataLoader(TensorDataset(ROWS), batch_size=10, shuffle=True)
    shuffled = measured(source, loader).report.output_sqnr_db
    assert shuffled == pytest.approx(measured(source, ROWS).report.output_sqnr_db, abs=1e-3)


class Named(NamedTuple):
    """A batch with names."""

    x: Tensor
    y: Tensor


def test_tuples_inside_a_batch_reach_the_model_as_they_were() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, x: Tensor, state: tuple[Tensor, Tensor], pair: Named) -> Tensor:
            assert type(state) is tuple
            assert type(pair) is Named
            found: Tensor = self.layer(x + state[0] + pair.y)
            return found

    batch = (ROWS, (ROWS, ROWS), Named(ROWS, ROWS))
    assert measured(Stateful().eval(), [batch]).report.samples == 40


@attrs.frozen
class Output:
    """An output that is no dataclass, and is not looked into."""

    scores: Tensor


def test_all_tensors_of_an_output_are_compared() -> None:
    class Many(Net):
        def forward(self, x: Tensor) -> dict[str, object]:  # type: ignore[override]  # the point
            hidden = self.body(x)
            return {"hidden": (hidden, [self.head(hidden)]), "count": 3, "ids": x.argmax(-1)}

    source = Many().eval()
    result = measured(source, ROWS)
    with torch.no_grad():
        ours = [x for x in tensors_in(source(ROWS)) if x.is_floating_point()]
        theirs = [x for x in tensors_in(result.model(ROWS)) if x.is_floating_point()]
    assert [x.shape[1] for x in ours] == [32, 8]
    assert result.report.output_sqnr_db == pytest.approx(sqnr64(ours, theirs), abs=1e-3)


def test_an_exact_output_is_infinitely_good() -> None:
    source = Net().eval()
    result = Quantizer().bits(4).skip("*").fit(ROWS).apply(source)
    assert result.report.output_sqnr_db == math.inf


def test_nothing_is_measured_without_data() -> None:
    report = Quantizer().apply(Net()).report
    assert report.output_sqnr_db is None
    assert report.samples == 0


def test_fit_runs_nothing() -> None:
    class Exploding(Dataset[Tensor]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, place: int) -> Tensor:
            raise AssertionError("the data was read")

    quantizer = Quantizer().fit(Exploding())
    source = Net().eval()
    quantizer.plan(source)
    assert not source.seen


@attrs.frozen(eq=False)
class Sum:
    """Rows seen and their sum."""

    count: int
    total: Tensor


@attrs.frozen
class Total(Statistic[Sum]):
    """A statistic of our own: an exact fold."""

    kind: ClassVar[str] = "total"

    def observe(self, x: Tensor) -> Sum:
        return Sum(len(x), x.double().sum(0))

    def merge(self, left: Sum, right: Sum) -> Sum:
        return Sum(left.count + right.count, left.total + right.total)


SUMS: list[Sum] = []


@attrs.frozen
class Asking(Rounding):
    """A rounding that wants to know its inputs."""

    kind: ClassVar[str] = "asking"

    @property
    def needs(self) -> tuple[AnyStatistic, ...]:
        return (Total(),)

    def round(self, weight: Tensor, grid: Grid, statistics: Statistics) -> QTensor:
        SUMS.append(statistics.state(Total()))
        return grid.scheme.quantize(weight, grid.qparams(weight))


@pytest.mark.parametrize("in_place", [False, True])
def test_statistics_are_gathered_from_the_float_inputs_of_each_layer(in_place: bool) -> None:
    SUMS.clear()
    source = Net().eval()
    with torch.no_grad():
        hidden = torch.relu(source.body(ROWS)).double()
    quantizer = Quantizer().rounding(Asking()).fit(pieces(ROWS, 10))
    result = (quantizer.apply_ if in_place else quantizer.apply)(source)
    assert [state.count for state in SUMS] == [40, 40]
    for state, expected in zip(SUMS, (ROWS.double(), hidden), strict=True):
        torch.testing.assert_close(state.total, expected.sum(0), rtol=1e-5, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in result.model.modules())


def test_statistics_need_data() -> None:
    with pytest.raises(CalibrationError, match=r"body, head needs data; give some with fit"):
        Quantizer().rounding(Asking()).apply(Net())


def test_a_layer_that_no_data_reached_is_named() -> None:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(16, 8)

    with pytest.raises(CalibrationError, match=r"no data reached 'spare'.*skip\('spare'\)"):
        Quantizer().rounding(Asking()).fit(ROWS).apply(Unused().eval())


def test_rows_of_a_linear_layer_are_its_last_dimension() -> None:
    layer, quantizer = nn.Linear(16, 8), LinearQuantizer()
    [(name, x)] = quantizer.inputs(layer, (noise(2, 3, 16),), {})
    assert (name, x.shape) == ("weight", (2, 3, 16))
    assert quantizer.rows(layer, name, x).shape == (6, 16)
    [(name, x)] = quantizer.inputs(layer, (), {"input": noise(5, 16)})
    assert quantizer.rows(layer, name, x).shape == (5, 16)


def test_a_state_that_was_not_gathered_is_refused() -> None:
    with pytest.raises(InputError, match="was not gathered"):
        Statistics().state(Total())


def test_samples_are_counted_by_the_first_tensor_of_a_batch() -> None:
    data = CalibrationData.bind([{"x": torch.tensor(3.0)}, ("text", [ROWS])])
    assert data.held().source == list(data.batches())
    assert len(list(data.batches())) == 2


def test_a_tuple_is_one_batch_of_arguments() -> None:
    x, y = noise(4, 16, seed=1), noise(4, 16, seed=2)
    source = Pair().eval()
    result = WEIGHTS_ONLY.bits(4).only("*").fit((x, y)).apply(source)
    assert result.report.samples == 4
    with torch.no_grad():
        expected = sqnr64([source(x, y)], [result.model(x, y)])
    assert result.report.output_sqnr_db == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (Net(), [ROWS, ROWS * torch.nan], r"batch 1 of the data holds NaN; .*fit\(data\)"),
        (nn.Embedding(9, 9), torch.full((2, 2), 99), r"say how with fit\(data, forward="),
    ],
    ids=["nan", "failure"],
)
def test_data_that_cannot_be_used_is_named_with_the_call_that_mends_it(
    model: nn.Module, data: object, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        Quantizer().fit(data).apply(model)
