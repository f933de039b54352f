"""The ways in which recurrent layers are called, against the float layer called like that."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from mono_quant import Quantizer
from mono_quant.modules import QuantizedRecurrent
from tests.helpers import assert_near
from tests.layers.recurrences import LAYERS, WIDTH, calibrated, decoded, naive, per_row, recurrent

Make = Callable[[], nn.RNNBase]
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
each_mode = pytest.mark.parametrize("mode", [None, "dynamic", "static"])
pytestmark = [
    # The float layer says it too.
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),  # it is deprecated
]
LENGTHS = [2, 5, 3, 5, 1]


def made(source: nn.RNNBase, mode: str | None) -> QuantizedRecurrent:
    quantizer = Quantizer().activations(mode)
    x = torch.randn(4, 5, WIDTH, dtype=next(source.parameters()).dtype)
    return recurrent(source, quantizer.fit(x) if mode == "static" else quantizer)


def states(layer: nn.RNNBase, batch: int, dtype: torch.dtype) -> list[Tensor]:
    """Return random states, of a batch or (for a batch of 0) without one."""
    count = layer.num_layers * (1 + layer.bidirectional)
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size]
    shapes = [(count, batch, size) if batch else (count, size) for size in sizes]
    return [torch.randn(shape, dtype=dtype) for shape in shapes[: 1 + (layer.mode == "LSTM")]]


def hidden(given: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return tuple(given) if len(given) == 2 else given[0]


def every(result: object) -> list[Tensor]:
    """Return output, h and c of a layer's result."""
    assert isinstance(result, tuple)
    output, last = result
    rows = output.data if isinstance(output, PackedSequence) else output
    return [rows, *([last] if isinstance(last, Tensor) else last)]


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_states_may_be_given(make: Make, dtype: torch.dtype) -> None:
    source = make().to(dtype)
    model = made(source, None)
    x, given = (
        torch.randn(4, 5, WIDTH).to(dtype),
        states(source, 4 if source.batch_first else 5, dtype),
    )
    with torch.no_grad():
        expected = decoded(model, source)(x.double(), hidden([one.double() for one in given]))
        for one, other in zip(every(model(x, hidden(given))), every(expected), strict=True):
            assert_near(one, other)


@each_layer
@each_mode
def test_a_sequence_without_a_batch_is_a_batch_of_one(make: Make, mode: str | None) -> None:
    source = make()
    model = made(source, mode)
    batch, x, given = (
        0 if source.batch_first else 1,
        torch.randn(5, WIDTH),
        states(source, 0, torch.float32),
    )
    with torch.no_grad():
        single = every(model(x, hidden(given)))
        of_one = every(model(x.unsqueeze(batch), hidden([one.unsqueeze(1) for one in given])))
        shapes = [one.shape for one in every(source(x, hidden(given)))]
    assert [one.shape for one in single] == shapes
    torch.testing.assert_close(single[0], of_one[0].squeeze(batch))
    for one, other in zip(single[1:], of_one[1:], strict=True):
        torch.testing.assert_close(one, other.squeeze(1))


@each_layer
@each_mode
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
def test_a_packed_sequence_is_each_sample_alone(make: Make, mode: str | None, given: bool) -> None:
    source = make().double()
    model, first = made(source, mode), source.batch_first
    x = torch.randn(5, 5, WIDTH, dtype=torch.float64)
    start = states(source, 5, torch.float64)
    start = start if given else [torch.zeros_like(one) for one in start]
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), first, enforce_sorted=False)
    with torch.no_grad():
        output, last = model(packed, hidden(start)) if given else model(packed)
    assert isinstance(output, PackedSequence)
    padded, lengths = pad_packed_sequence(output, first)
    assert lengths.tolist() == LENGTHS
    twin, names = decoded(model, source), model.packed_weights()
    grids = calibrated(model) if mode == "static" else dict.fromkeys(names, per_row)
    for place, length in enumerate(LENGTHS):
        sample = (x[place] if first else x[:, place])[:length]
        with torch.no_grad():
            rows, ends = naive(
                twin, sample, [one[:, place] for one in start], grids if mode is not None else {}
            )
        found = (padded[place] if first else padded[:, place])[:length]
        torch.testing.assert_close(found, rows, rtol=0, atol=1e-9)
        for one, other in zip([last] if isinstance(last, Tensor) else last, ends, strict=True):
            torch.testing.assert_close(one[:, place], other, rtol=0, atol=1e-9)


@each_layer
@each_mode
def test_a_sorted_packed_sequence_keeps_its_form(make: Make, mode: str | None) -> None:
    source = make()
    model = made(source, mode)
    packed = pack_padded_sequence(torch.randn(5, 3, WIDTH), torch.tensor([5, 3, 1]))
    with torch.no_grad():
        output, _ = model(packed)
        expected, _ = source(packed)
    assert isinstance(output, PackedSequence)
    assert output.sorted_indices is None
    assert output.unsorted_indices is None
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    assert output.data.shape == expected.data.shape


@each_layer
@each_mode
def test_an_empty_batch_gives_an_empty_result(make: Make, mode: str | None) -> None:
    source = make()
    model = made(source, mode)
    x = torch.randn((0, 5, WIDTH) if source.batch_first else (5, 0, WIDTH))
    with torch.no_grad():
        found, expected = every(model(x)), every(source(x))
    assert [one.shape for one in found] == [one.shape for one in expected]


@pytest.mark.parametrize("kind", ["LSTM plain", "GRU plain", "relu plain"])
@each_mode
@pytest.mark.parametrize(
    ("x", "batch"),
    [
        (torch.randn(4, 5, WIDTH + 1), None),
        (torch.randn(WIDTH), None),
        (torch.randn(1, 4, 5, WIDTH), None),
        (torch.randn(0, 5, WIDTH), None),
        (torch.randn(4, 5, WIDTH), 4),
        (torch.randn(4, 5, WIDTH), 0),
        (torch.randn(4, WIDTH), 1),
        (torch.randn(4, 5, WIDTH, dtype=torch.float64), None),
        (torch.ones(4, 5, WIDTH, dtype=torch.int64), None),
    ],
    ids=["width", "1-D", "4-D", "no step", "batch", "2-D state", "3-D state", "dtype", "integers"],
)
def test_what_does_not_fit_is_refused_as_torch_refuses_it(
    kind: str, mode: str | None, x: Tensor, batch: int | None
) -> None:
    source = LAYERS[kind]()
    model = made(source, mode)
    given = [hidden(states(source, batch, torch.float32))] if batch is not None else []
    with pytest.raises((ValueError, RuntimeError)) as expected:
        source(x, *given)
    with pytest.raises(expected.type):
        model(x, *given)


def test_flattening_parameters_as_forwards_do_changes_nothing() -> None:
    model = made(LAYERS["LSTM plain"](), None)
    x = torch.randn(4, 5, WIDTH)
    before = model(x)[0]
    model.flatten_parameters()
    assert torch.equal(every(model(x))[0], before)
