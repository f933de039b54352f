"""What a result does: validate, dequantize, export, save; and results of bare state dicts."""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor, nn

from mono_quant import (
    BareWeightQuantizer,
    Checkpoint,
    CheckpointError,
    CorruptCheckpointError,
    InputError,
    QuantizedLayer,
    Quantizer,
    SafetensorsSerializer,
    Serializer,
    TorchSerializer,
    load_model,
    quantize,
    read_state_dict,
    sqnr_db,
    validate_quantization,
)
from mono_quant.configurable import Kinds
from mono_quant.modules import BareModule, QuantizedBareModule
from tests.helpers import (
    TiedModel,
    assert_like_float,
    assert_near,
    noise,
    oracle,
    same_bits,
    same_tensors,
    stack_and_step,
)
from tests.serializers.files import MODELS, small, write

Make = Callable[[], tuple[nn.Module, Tensor]]
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@each_model
@pytest.mark.parametrize("serializer", [None, SafetensorsSerializer(), TorchSerializer()])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_model_that_was_reloaded_and_run_is_valid(
    make: Make, serializer: Serializer | None, bits: int
) -> None:
    source, x = make()
    result = Quantizer().bits(bits).only("*").apply(source)
    before = result.model.training
    validation = result.validate(x, serializer=serializer)
    assert validation.status == "valid", str(validation)
    assert bool(validation) is True
    assert [check for check, _ in validation.checks] == ["saved", "reloaded", "run"]
    assert result.model.training is before


def test_without_an_example_it_is_reloaded_and_not_run() -> None:
    validation = Quantizer().apply(small()).validate()
    assert validation.status == "reloaded, not run"
    assert bool(validation) is False
    assert "validate(example=...)" in str(validation)


def test_the_first_batch_of_the_data_is_the_example() -> None:
    calls: list[object] = []

    def forward(model: nn.Module, batch: object) -> object:
        calls.append(batch)
        assert isinstance(batch, list)
        return model(batch[0])

    result = Quantizer().fit([[noise(3, 64)], [noise(2, 64)]], forward=forward).apply(small())
    calls.clear()
    assert result.validate()
    assert len(calls) == 2, "once for the model and once for the reloaded one"
    for batch in calls:
        assert isinstance(batch, list)
        assert same_bits(batch[0], noise(3, 64))


@pytest.mark.parametrize(
    "example", [noise(2, 64), (noise(2, 64),), [noise(2, 64)], {"input": noise(2, 64)}], ids=type
)
def test_an_example_is_a_batch(example: object) -> None:
    result = Quantizer().apply(small())
    assert result.validate(example)
    assert validate_quantization(result.model, example)


def test_labels_of_an_example_are_left_out() -> None:
    assert Quantizer().apply(small()).validate((noise(2, 64), torch.tensor([0, 1])))


class Corrupting(SafetensorsSerializer):
    """Changes something on the way."""

    def __init__(self, harm: Callable[[Checkpoint], Checkpoint]) -> None:
        self.harm = harm

    def load(self, path: Path, *, kinds: Kinds | None = None) -> Checkpoint:
        return self.harm(super().load(path, kinds=kinds))


def flip_a_code(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.records["0.weight"].weight.tensors["codes"].view(-1)[7] ^= 1
    return checkpoint


def nudge_a_scale(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.records["2.weight"].weight.tensors["scale"].view(-1)[0] *= 1.01
    return checkpoint


def negate_a_zero(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.tensors["1.running_mean"].copy_(-torch.zeros(16))
    return checkpoint


def widen_a_bias(checkpoint: Checkpoint) -> Checkpoint:
    tensors = {**checkpoint.tensors, "2.bias": checkpoint.tensors["2.bias"].double()}
    return attrs.evolve(checkpoint, tensors=tensors)


def lose_a_weight(checkpoint: Checkpoint) -> Checkpoint:
    records = {key: record for key, record in checkpoint.records.items() if key != "2.weight"}
    return attrs.evolve(checkpoint, records=records)


def lose_a_bias(checkpoint: Checkpoint) -> Checkpoint:
    tensors = {key: tensor for key, tensor in checkpoint.tensors.items() if key != "2.bias"}
    return attrs.evolve(checkpoint, tensors=tensors)


def refuse(checkpoint: Checkpoint) -> Checkpoint:
    raise CorruptCheckpointError("it is not whole")


@pytest.mark.parametrize(
    ("harm", "seen"),
    [
        (flip_a_code, r"0\.weight differs"),
        (nudge_a_scale, r"2\.weight differs"),
        (negate_a_zero, r"1\.running_mean differs"),
        (widen_a_bias, r"2\.bias differs"),
        (lose_a_weight, r"2\.weight"),
        (lose_a_bias, r"2\.bias"),
        (refuse, "it is not whole"),
    ],
)
@pytest.mark.parametrize("with_example", [False, True])
def test_whatever_changes_on_the_way_fails(
    harm: Callable[[Checkpoint], Checkpoint], seen: str, with_example: bool
) -> None:
    result = Quantizer().bits(4).only("*").apply(small())
    example = noise(2, 64) if with_example else None
    validation = result.validate(example, serializer=Corrupting(harm))
    assert validation.status == "failed"
    assert not validation
    assert re.search(seen, str(validation)), str(validation)


def test_an_output_without_a_finite_value_fails() -> None:
    source = small()
    with torch.no_grad():
        source.get_parameter("2.bias")[:] = torch.nan
    validation = Quantizer().apply(source).validate(noise(2, 64))
    assert validation.status == "failed"
    assert validation.checks[-1] == ("run", "no value of the output is finite")


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_an_output_that_is_not_finite_in_places_may_be_valid(odd: float) -> None:
    """Padded rows under a mask are NaN, masked logits are minus infinity: in both models alike."""
    source = small()
    with torch.no_grad():
        source.get_parameter("2.bias")[0] = odd
    count = 2 * len(source.get_parameter("2.bias"))
    validation = Quantizer().apply(source).validate(noise(2, 64))
    assert validation.status == "valid"
    assert validation.checks[-1] == (
        "run",
        f"{count} output values, equal to the bit, 2 of them not finite",
    )


def test_validation_leaves_no_file_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = small().train()
    result = Quantizer().apply(source)
    state = {key: tensor.clone() for key, tensor in result.model.state_dict().items()}
    assert result.validate(noise(2, 64))
    assert not list(tmp_path.iterdir())
    assert all(same_bits(tensor, state[key]) for key, tensor in result.model.state_dict().items())
    assert result.model.training
    assert torch.is_grad_enabled()


def test_a_dequantized_result_is_the_float_model_on_its_grid() -> None:
    source = small()
    result = Quantizer().bits(4).only("*").apply(source)
    floats = result.dequantize()
    assert [type(module) for module in floats] == [type(module) for module in source]
    assert list(floats.state_dict()) == list(source.state_dict())
    x = noise(3, 64)
    expected = oracle(result.model, source)(x.double())
    assert_near(floats(x), expected)
    assert same_bits(floats(x), result.model(x))
    assert isinstance(result.model[0], QuantizedLayer), "the model itself stays quantized"


def test_a_dequantized_model_shares_no_object_with_the_quantized_one() -> None:
    result = Quantizer().apply(small())
    floats = result.dequantize().double().train()
    assert result.model[0].bias.dtype == torch.float32
    assert not result.model.training
    assert floats.training


def test_a_dequantized_model_can_be_trained_and_quantized_again() -> None:
    floats = Quantizer().bits(4).apply(small()).dequantize()
    floats(noise(3, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in floats.parameters())
    again = Quantizer().bits(4).apply(floats).model
    assert_like_float(again, floats, noise(3, 64))


def test_the_report_tells_the_sqnr_of_each_weight() -> None:
    source = small()
    result = Quantizer().bits(4).only("*").apply(source)
    twin = oracle(result.model, source)
    for row in result.report.quantized:
        path = row.name.removesuffix(".weight")
        weight, dequantized = source.get_submodule(path).weight, twin.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        assert isinstance(dequantized, Tensor)
        assert row.sqnr_db == pytest.approx(sqnr_db(weight.double(), dequantized), abs=1e-4)


def bare(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict without ties, as files have them."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Everything(nn.Module):
    """Weights of 2 to 5 dimensions, grouped ones, an embedding, norms and counters."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(20, 64)
        self.linear = nn.Linear(64, 24, bias=False)
        self.norm = nn.BatchNorm1d(24)
        self.conv1 = nn.Conv1d(24, 32, 3, groups=4, padding=1)
        self.depthwise = nn.Conv1d(32, 32, 25, groups=32, padding=12)
        self.conv2 = nn.Conv2d(1, 64, 3)
        self.conv3 = nn.Conv3d(1, 64, (1, 3, 3))
        self.transposed = nn.ConvTranspose1d(32, 24, 5, groups=2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden: Tensor = self.norm(self.linear(self.embeddings(x)).transpose(1, 2))
        hidden = self.depthwise(self.conv1(hidden))
        return (
            self.transposed(hidden),
            self.conv2(hidden[:, None]),
            self.conv3(hidden[:, None, None]),
        )


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_bare_state_dict_is_quantized_by_names_and_dimensions(bits: int) -> None:
    state = bare(Everything())
    result = Quantizer().bits(bits).apply(state)
    found = {row.name for row in result.report.quantized}
    expected = {
        name for name, tensor in state.items() if name.endswith("weight") and tensor.dim() > 1
    }
    if bits < 8:
        expected.discard("embeddings.weight")
    assert found == expected
    assert isinstance(result.model, BareModule)
    assert isinstance(result.model.get_submodule("linear"), QuantizedBareModule)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_bare_file_goes_into_the_real_architecture(
    bits: int, suffix: str, tmp_path: Path
) -> None:
    source = Everything().eval()
    result = Quantizer().bits(bits).apply(bare(source))
    path = result.save(tmp_path / f"model{suffix}")
    loaded = load_model(path, Everything().eval())
    twin = Everything().eval().double()
    state = bare(source)
    for name, packed in bare_weights(result.model).items():
        state[name] = packed
    twin.load_state_dict(state)
    x = torch.randint(0, 20, (2, 9))
    with torch.no_grad():
        for found, expected in zip(loaded(x), twin(x), strict=True):
            assert_near(found, expected)
    quantized = {row.name for row in result.report.quantized}
    for name, module in loaded.named_modules():
        assert isinstance(module, QuantizedLayer) is (f"{name}.weight" in quantized)


def bare_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the dequantized weights of a bare model in float64, rows along the first dimension."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            packed = module.packed_weights()["weight"]
            native = packed.layout.native
            values, _ = stack_and_step(packed, torch.Size(native[1:]).numel())
            found[f"{name}.weight"] = values.reshape(native)
    return found


@pytest.mark.parametrize(
    "name",
    ["embeddings", "tok_embeddings", "transformer.wte", "wpe", "model.embed_tokens", "Embedding_1"],
)
def test_names_of_embeddings_stay_float_below_8_bits(name: str) -> None:
    state = {f"{name}.weight": noise(100, 64), "head.weight": noise(64, 64)}
    low = Quantizer().bits(4).apply(state).report
    assert [row.name for row in low.quantized] == ["head.weight"]
    [kept] = low.kept
    assert kept.reason == "by its name an embedding: float below 8 bits unless asked for"
    assert len(Quantizer().apply(state).report.quantized) == 2
    assert len(Quantizer().override(name, bits=4).bits(4).apply(state).report.quantized) == 2


def test_a_bare_result_cannot_be_run_and_says_so() -> None:
    result = Quantizer().apply(bare(small()))
    with pytest.raises(InputError, match="cannot be run; load the file into a model"):
        result.model()
    validation = result.validate(noise(2, 64))
    assert validation.status == "reloaded, not run"
    assert "a state dict has no forward" in str(validation)


class Reader(nn.Module):
    """Layers of torch whose weights are not called ``weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.other = nn.MultiheadAttention(64, 4, kdim=32, vdim=48, batch_first=True)
        self.recurrent = nn.LSTM(64, 32, 2, bidirectional=True, batch_first=True)
        self.cell = nn.GRUCell(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Return something of all of them, for ``[N, T, 64]``."""
        x = x + self.attention(x, x, x)[0]
        x = x + self.other(x, x[..., :32], x[..., :48])[0]
        return torch.cat([self.recurrent(x)[0][:, -1], self.cell(x[:, 0])], dim=-1)


def test_weights_of_attention_and_recurrent_layers_are_known_in_a_bare_file(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model, x = Reader().eval(), noise(3, 5, 64)
    known = Quantizer().activations(None)
    result = known.apply(model.state_dict())
    rows = {row.name for row in result.report.quantized}
    assert rows == {row.name for row in known.apply(model).report.quantized}
    loaded = load_model(result.save(tmp_path / "small.safetensors"), Reader).eval()
    assert same_bits(loaded(x), known.apply(model).model(x))


def test_a_bare_result_cannot_be_exported_and_says_so() -> None:
    with pytest.raises(InputError, match="no forward to export; load the file into its model"):
        Quantizer().apply(bare(small())).export(noise(2, 64))


def test_what_stays_float_of_a_bare_state_dict_says_which_tensors_do_not() -> None:
    state = {**bare(small()), "experts": noise(4, 32, 64), "norm.weight": noise(64)}
    rows = {row.name: row.reason for row in Quantizer().apply(state).report.kept}
    why = "of a state dict, tensors of 2 to 5 dimensions called as weights are quantized"
    assert rows["(root)"] == rows["norm"] == why


def test_a_result_and_its_plan_say_in_one_line_what_they_are() -> None:
    plan = Quantizer().bits(4).plan(small())
    result = plan.run()
    assert repr(plan) == f"<Plan of Sequential: {result.report.sizes}>"
    assert repr(result) == f"<QuantizationResult of Sequential: {result.report.sizes}>"
    assert result.report.sizes in str(result.report)
    assert result._repr_html_() == result.report._repr_html_()


def test_data_has_no_use_for_a_bare_state_dict() -> None:
    with pytest.raises(InputError, match=r"fit\(data\) has no use; give the model"):
        Quantizer().fit(noise(2, 64)).apply(bare(small()))


def test_a_bare_state_dict_is_selected_by_name() -> None:
    result = Quantizer().skip("2").apply(bare(small()))
    assert [row.name for row in result.report.quantized] == ["0.weight"]


def test_the_given_state_dict_is_not_changed() -> None:
    state = bare(Everything())
    before = {name: tensor.clone() for name, tensor in state.items()}
    result = Quantizer().apply(state)
    result.model.to(torch.bfloat16)
    assert all(same_bits(state[name], before[name]) for name in before)


def test_tied_tensors_of_a_state_dict_are_one(tmp_path: Path) -> None:
    source = TiedModel()
    result = Quantizer().apply(source.state_dict())
    [row] = [row for row in result.report.quantized if row.aliases]
    assert (row.name, row.aliases) == ("embedding.weight", ("head.weight",))
    loaded = load_model(result.save(tmp_path / "model.safetensors"), TiedModel())
    assert isinstance(loaded.embedding, QuantizedLayer)
    assert isinstance(loaded.head, QuantizedLayer)
    assert loaded.embedding.quantized_weights["weight"] is loaded.head.quantized_weights["weight"]


@pytest.mark.parametrize("name", ["", ".weight", "layer..weight", "layer."])
def test_what_is_no_name_of_a_tensor_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="is no name in a state dict"):
        Quantizer().apply({name: noise(64, 64)})


def test_a_weight_of_integers_is_left_as_it_is() -> None:
    state = {"0.weight": torch.arange(4096).reshape(64, 64), "1.weight": noise(64, 64)}
    result = Quantizer().apply(state)
    assert [row.name for row in result.report.quantized] == ["1.weight"]
    assert same_bits(result.model.get_buffer("0.weight"), state["0.weight"])


def test_a_bare_weight_is_known_by_its_dimensions() -> None:
    quantizer = BareWeightQuantizer()
    for shape, known in (((3,), False), ((3, 3), True), ((3,) * 5, True), ((3,) * 6, False)):
        module = BareModule()
        module.register_parameter("weight", nn.Parameter(torch.zeros(shape)))
        assert quantizer.matches(module) is known
    assert not quantizer.matches(nn.Linear(3, 3))


STATE = OrderedDict(bare(small()))
NESTED: dict[str, object] = {
    "plain": dict(STATE),
    "ordered": STATE,
    "state_dict": {"state_dict": STATE, "epoch": 3, "lr": 0.1},
    "model_state_dict": {"epoch": 3, "model_state_dict": STATE, "optimizer": {"state": {}}},
    "model": {"model": STATE, "args": [1, 2]},
    "model_state": {"step": 100, "model_state": STATE},
    "twice": {"state_dict": {"model": STATE, "seen": 3}},
}


@pytest.mark.parametrize("content", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "old format"])
def test_a_state_dict_is_found_in_a_checkpoint(content: object, new: bool, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path, _use_new_zipfile_serialization=new)
    found = read_state_dict(path)
    assert list(found) == list(STATE)
    assert all(same_bits(found[name], STATE[name]) for name in STATE)
    assert same_tensors(quantize(path).model, quantize(STATE).model)


def test_a_state_dict_is_read_from_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "float.safetensors"
    write(path, {}, STATE)
    found = read_state_dict(path)
    assert set(found) == set(STATE)
    assert all(same_bits(found[name], STATE[name]) for name in STATE)
    quantized = {row.name for row in quantize(path, bits=8).report.quantized}
    assert quantized == {"0.weight", "2.weight"}


@pytest.mark.parametrize(
    "content",
    [{"epoch": 3}, {}, [1], noise(3), {"model": 3}, {"weights": STATE}],
    ids=["number", "empty", "list", "tensor", "no mapping", "other name"],
)
def test_a_file_without_a_state_dict_is_refused_with_the_names_that_were_looked_for(
    content: object, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=path.name):
        read_state_dict(path)


def test_a_missing_checkpoint_is_an_os_error(tmp_path: Path) -> None:
    for name in ("model.pt", "model.safetensors"):
        with pytest.raises(FileNotFoundError, match=name):
            read_state_dict(tmp_path / name)


class Dice(nn.Module):
    """Draws random numbers in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found + torch.rand_like(found)


def test_a_model_that_draws_random_numbers_is_valid_and_none_are_used_up() -> None:
    result = Quantizer().apply(Dice())
    before = torch.get_rng_state()
    assert result.validate(noise(2, 64))
    assert torch.equal(torch.get_rng_state(), before)


class Masked(nn.Module):
    """Gives minus infinity where a mask says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found.masked_fill(torch.arange(64) % 2 == 0, -torch.inf)


def test_the_damage_of_masked_logits_is_that_of_the_others() -> None:
    source, x = Masked().eval(), noise(5, 64)
    result = Quantizer().fit(x).apply(source)
    ours, theirs = result.model(x)[:, 1::2], source(x)[:, 1::2]
    assert result.report.output_sqnr_db == pytest.approx(
        sqnr_db(theirs.detach(), ours.detach()), abs=1e-3
    )
    assert not any("finite" in line for line in result.report.warnings)


def test_a_single_value_of_an_odd_stride_is_compared() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    model.register_buffer("one", torch.ones(2)[::2])
    assert model.get_buffer("one").stride() == (2,)
    assert Quantizer().apply(model).validate(torch.randn(2, 64))
