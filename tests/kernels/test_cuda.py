"""Kernels for CUDA: their arithmetic here, with the operators as documented; the rest on a GPU."""

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from mono_quant import Float8, PerTensor, QuantizedLayer, Quantizer, kernels
from mono_quant.base import Kernel, KernelSpec
from mono_quant.kernels import (
    REFERENCE,
    CudaDecoded,
    CudaFloat8,
    CudaInt4,
    CudaInteger,
    CudaTilesDecoded,
)
from mono_quant.kernels import cuda as module
from mono_quant.kernels import cuda_tiles as tiles_module
from mono_quant.kernels.ops import int_mm_refusal, untraced
from mono_quant.modules import layer as layer_module
from mono_quant.modules import weight as weight_module
from tests.helpers import noise, same_bits
from tests.kernels.cases import CPU, EPS, INTEGERS, exact, layer, run, spec_of
from tests.kernels.test_int4 import GRIDS, ROUND, SHAPE, parts

INTEGER, FLOAT8, INT4 = CudaInteger(), CudaFloat8(), CudaInt4()
DECODED = CudaTilesDecoded()
PLAIN = Quantizer().activations(None)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GPU = torch.device("cuda", 0)
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("grid", INTEGERS)
def test_integer_products_round_with_the_scales_alone(grid: str) -> None:
    if why := int_mm_refusal():
        pytest.skip(why)
    made = layer(INTEGERS[grid], 64, 1040)
    for rows in (1, 3, 16, 17, 64):
        x = noise(rows, 1040, seed=rows)
        expected, _ = exact(made, x)
        found = run(INTEGER, made, x)
        assert ((found - expected).abs() <= 3.1 * EPS * expected.abs() + 1e-37).all()
    x = noise(3, 1040)
    x[0, 3] = float("nan")
    found = run(INTEGER, made, x, noise(64))
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()
    assert run(INTEGER, made, x[:0]).shape == (0, 64)


FLOATS = {
    "dynamic": Quantizer().scheme(Float8()).activations("dynamic", dtype=E4M3),
    "dynamic, per tensor": Quantizer()
    .scheme(Float8(granularity=PerTensor()))
    .activations("dynamic", dtype=E4M3, granularity="tensor"),
    "inputs of e5m2": Quantizer().scheme(Float8()).activations("dynamic", dtype=E5M2),
    "weight of e5m2": Quantizer().scheme(Float8(E5M2)).activations("dynamic", dtype=E4M3),
    "static": Quantizer()
    .scheme(Float8())
    .activations("static", dtype=E4M3)
    .fit(noise(64, 1040, seed=5)),
    "float16 scales": Quantizer()
    .scheme(Float8(scale_dtype=torch.float16))
    .activations("dynamic", dtype=E4M3),
}
"""Weights and inputs of 8-bit floats."""

ON_GPU: Mapping[Kernel, tuple[Quantizer, float]] = {
    INTEGER: (Quantizer(), 1e-5),
    FLOAT8: (FLOATS["dynamic"], 1e-3),
    CudaDecoded(): (PLAIN, 1e-5),
    INT4: (Quantizer().bits(4), 2e-2),
    DECODED: (Quantizer().bits(4), 1e-2),
}
"""What each computes, and by how much it may differ from the reference, as a share."""

BY_ROW = {
    "per channel": PLAIN,
    "per tensor": PLAIN.granularity("tensor"),
    "asymmetric": PLAIN.asymmetric(),
}
"""8-bit weights that meet float inputs."""


@pytest.mark.parametrize("grid", FLOATS)
def test_products_of_floats_round_as_sums_of_float32(grid: str) -> None:
    try:
        torch._scaled_mm(*(torch.zeros(16, 16).to(E4M3),) * 2, *(torch.ones(()),) * 2)
    except (NotImplementedError, RuntimeError) as why:
        pytest.skip(f"this torch has no such product on a CPU: {why}")
    made = layer(FLOATS[grid], 64, 1040)
    for rows in (1, 3, 17):
        x = noise(rows, 1040, seed=rows)
        x[0, :7] = 0
        expected, size = exact(made, x)
        found = run(FLOAT8, made, x).double()
        assert found.shape == expected.shape
        assert ((found - expected).abs() <= 1040 * EPS * size).all()
    x = noise(3, 1040)
    x[0, 3], x[1] = float("nan"), 0
    found = run(FLOAT8, made, x, noise(64))
    assert torch.equal(found.isnan(), run(REFERENCE, made, x).isnan())
    assert found[0].isnan().all()
    assert found[1].isnan().all() or same_bits(found[1], noise(64))
    assert run(FLOAT8, made, x[:0]).shape == (0, 64)


SHUFFLED = torch.randperm(1024, generator=torch.Generator().manual_seed(0))
"""Any order of codes within a tile will do, so long as it is the same in all of them."""


def documented_pack(codes: Tensor, inner: int) -> Tensor:
    """Return what stands for packed codes: the high nibble is the even column."""
    assert codes.dtype == torch.uint8
    rows, length = codes.shape[0], 2 * codes.shape[1]
    assert rows % 8 == 0
    assert inner == 8
    assert length % (16 * inner) == 0
    plain = torch.stack([codes >> 4, codes & 15], -1).view(rows // 8, 8, length // 128, 128)
    tiles = plain.transpose(1, 2).reshape(-1, 1024)[:, SHUFFLED]
    packed = (tiles[:, 0::2] | tiles[:, 1::2] << 4).view(torch.int32)
    return packed.view(rows // 8, length // 128, 32, 4)


def documented_codes(packed: Tensor) -> Tensor:
    stored = packed.view(torch.uint8).reshape(-1, 512)
    tiles = torch.stack([stored & 15, stored >> 4], -1).flatten(1)[:, SHUFFLED.argsort()]
    plain = tiles.view(packed.shape[0], packed.shape[1], 8, 128).transpose(1, 2)
    return plain.reshape(packed.shape[0] * 8, packed.shape[1] * 128)


def documented_mm(x: Tensor, packed: Tensor, group: int, pairs: Tensor) -> Tensor:
    assert x.dtype == pairs.dtype == torch.bfloat16
    codes = documented_codes(packed)
    assert pairs.shape == (x.shape[1] // group, len(codes), 2)
    scale, offset = (part.t().float().repeat_interleave(group, 1) for part in pairs.unbind(-1))
    return (x.float() @ ((codes.float() - 8) * scale + offset).t()).to(torch.bfloat16)


@pytest.mark.parametrize("grid", GRIDS)
def test_four_bits_are_given_as_the_operator_takes_them(
    grid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", documented_pack)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", documented_mm)
    monkeypatch.setattr(tiles_module, "_found_places", tiles_module._found_places.__wrapped__)
    made = layer(GRIDS[grid], *SHAPE)
    size = parts(made)
    for rows in (1, 17):
        x = noise(rows, SHAPE[1], seed=rows)
        expected, _ = exact(made, x)
        once = x.double().abs() @ size.t()
        room = (2 * ROUND + ROUND**2) * once + ROUND * (expected.abs() + 3 * ROUND * once)
        assert ((run(INT4, made, x) - expected).abs() <= room + EPS * SHAPE[1] * once).all()
        room = 2 * ROUND * once  # the pairs alone are rounded
        assert ((run(DECODED, made, x) - expected).abs() <= room + EPS * SHAPE[1] * once).all()
    weight = made.packed_weights()["weight"]
    tiles = INT4.arrange(spec_of(made), weight)
    assert same_bits(tiles.canonical(), weight.tensors["codes"])
    assert tiles.beside == tiles.pairs.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("many", [False, True])
def test_traces_read_tiles(grid: str, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", documented_pack)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", documented_mm)
    monkeypatch.setattr(tiles_module, "_found_places", tiles_module._found_places.__wrapped__)
    monkeypatch.setattr(tiles_module, "refuse", lambda *_: None)  # this is no CUDA device
    monkeypatch.setattr(tiles_module, "trial", lambda *_: None)
    monkeypatch.setattr(kernels, "_TRACED", (INT4,))
    monkeypatch.setattr(weight_module, "INT4_TRACED", INT4)
    monkeypatch.setattr(layer_module, "for_many", lambda *_: DECODED)
    monkeypatch.setattr(layer_module, "most_rows", lambda *_: 0 if many else 100)
    made, other = layer(GRIDS[grid], *SHAPE), layer(GRIDS[grid], *SHAPE)
    traces: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        traces.append(graph)
        return graph.forward

    torch.compiler.reset()
    call, bias = torch.compile(made, fullgraph=True, backend=backend), made.get_parameter("bias")
    with torch.no_grad():
        x = noise(17, SHAPE[1])
        assert same_bits(call(x), run(DECODED if many else INT4, made, x, bias))
        x = noise(1, SHAPE[1])
        expected = run(DECODED if many else INT4, made, x, bias)
        assert same_bits(call(x), expected)
        assert "codes" not in dict(made.named_buffers())
        before = len(traces)
        other._holder("weight")._steady()  # what a layer that is decoded in a trace asks for
        assert same_bits(call(x), expected)
        assert len(traces) == before
        made.state_dict()  # puts canonical codes back, and the next call traces anew
        assert same_bits(call(x), expected)
        assert len(traces) <= before + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [*BY_ROW, "fp8"])
def test_a_weight_is_decoded_in_one_rounding(grid: str, dtype: torch.dtype) -> None:
    made = layer({**BY_ROW, "fp8": Quantizer().scheme(Float8())}[grid], 64, 1040)
    for rows in (1, 17):
        x, bias = noise(rows, 1040, seed=rows).to(dtype), noise(64)
        if dtype == torch.float32:
            assert same_bits(run(CudaDecoded(), made, x, bias), run(REFERENCE, made, x, bias))
        found = run(CudaDecoded(), made, x)
        assert found.dtype == dtype
        expected, once = exact(made, x)
        half = torch.finfo(dtype).eps / 2
        room = half * once + EPS * 1040 * once + half * (expected.abs() + once * half)
        assert ((found.double() - expected).abs() <= 1.01 * room + 1e-4).all()


def test_they_say_why_they_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "trial", lambda name, program, device: None)
    monkeypatch.setattr(tiles_module, "trial", lambda name, program, device: None)
    eight, four = layer(INTEGERS["dynamic"], 64, 1040), layer(GRIDS["groups of 64"], *SHAPE)
    floats = layer(FLOATS["dynamic"], 64, 1040)
    for kernel, made in ((INTEGER, eight), (FLOAT8, floats), (INT4, four)):
        spec = spec_of(made)
        assert kernel.supports(spec, GPU, torch.float32) is None
        assert "on cpu" in str(kernel.supports(spec, CPU, torch.float32))
        assert "float64" in str(kernel.supports(spec, GPU, torch.float64))
    assert "8-bit" in str(INTEGER.supports(spec_of(four), GPU, torch.float32))
    assert "8-bit" in str(INT4.supports(spec_of(eight), GPU, torch.float32))
    assert "not 8-bit floats" in str(FLOAT8.supports(spec_of(eight), GPU, torch.float32))
    mixed = layer(Quantizer().scheme(Float8()).activations("dynamic"), 64, 1040)
    assert "inputs are 8-bit asym" in str(FLOAT8.supports(spec_of(mixed), GPU, torch.float32))
    alone = layer(Quantizer().scheme(Float8()), 64, 1040)
    assert "inputs are float" in str(FLOAT8.supports(spec_of(alone), GPU, torch.float32))
    coarse = layer(Quantizer().scheme(Float8(E5M2)).activations("dynamic", dtype=E5M2), 64, 1040)
    assert "float8_e4m3fn" in str(FLOAT8.supports(spec_of(coarse), GPU, torch.float32))
    narrow = layer(FLOATS["dynamic"], 72, 1040)
    assert "multiples of 16" in str(FLOAT8.supports(spec_of(narrow), GPU, torch.float32))
    weights = layer(Quantizer().activations(None), 64, 1040)
    assert "inputs are float" in str(INTEGER.supports(spec_of(weights), GPU, torch.float32))
    odd = layer(INTEGERS["dynamic"], 65, 1040)
    assert "multiples of 8" in str(INTEGER.supports(spec_of(odd), GPU, torch.float32))
    narrow = layer(Quantizer().bits(4), 1024, 64)
    assert "8 x 128" in str(INT4.supports(spec_of(narrow), GPU, torch.float32))
    quantized = layer(Quantizer().bits(4).activations("dynamic"), *SHAPE)
    assert "inputs are dynamic" in str(INT4.supports(spec_of(quantized), GPU, torch.float32))
    monkeypatch.setattr(module, "trial", lambda name, program, device: "it died")
    assert INTEGER.supports(spec_of(eight), GPU, torch.float32) == "it died"


@gpu
@needs_gpu
@pytest.mark.parametrize("kernel", ON_GPU, ids=lambda kernel: kernel.name)
def test_on_a_gpu_layers_are_what_the_reference_makes_of_them(kernel: Kernel) -> None:
    quantizer, room = ON_GPU[kernel]
    name = kernel.name
    made = quantizer.only("*").apply(nn.Linear(1024, 512), progress=False).model.to(GPU)
    assert isinstance(made, QuantizedLayer)
    state = {key: value.clone() for key, value in made.state_dict().items()}
    assert kernel.supports(spec_of(made), GPU, torch.float32) is None
    with torch.no_grad():
        for rows in (1, 16, 17, 300):
            x = noise(rows, 1024, seed=rows).to(GPU)
            with kernels.use("reference"):
                expected = made(x)
            with kernels.use(name):
                found = made(x)
            error = (found - expected).norm() / expected.norm()
            assert float(error) < room
            with kernels.use(name):
                assert same_bits(copy.deepcopy(made)(x), found)
                differs = name != CudaDecoded.name  # which does what the reference does
                assert same_bits(found, expected) != differs, "another kernel ran"
            made(x)  # whatever is fastest
    assert all(same_bits(value.cpu(), state[key].cpu()) for key, value in made.state_dict().items())
    assert made.cpu()(noise(2, 1024)).shape == (2, 512)


@gpu
@needs_gpu
def test_on_a_gpu_the_trials_find_another_order() -> None:
    wrong = tiles_module._TRIAL.replace("high << 4 | low", "low << 4 | high")
    assert "another order" in str(module.trial("another order", wrong, GPU))


@pytest.mark.parametrize("grid", ["float8", "dynamic", "asymmetric weight"])
def test_products_are_traced_in_one_piece(grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if grid != "float8" and (why := int_mm_refusal()):
        pytest.skip(why)

    def on_a_cpu(spec: KernelSpec, device: torch.device, dtype: torch.dtype, place: str) -> None:
        return None

    @untraced
    def works(name: str, program: str, device: torch.device) -> str | None:
        return None if "scaled rows" not in name else "no"

    made = layer({**INTEGERS, "float8": FLOATS["dynamic"]}[grid], 64, 1040, bias=False)
    monkeypatch.setattr(module, "refuse", on_a_cpu)
    monkeypatch.setattr(module, "trial", works)
    kernel = FLOAT8 if grid == "float8" else INTEGER
    monkeypatch.setattr(kernels, "INTEGER_TRACED", kernel)
    torch.compiler.reset()
    calls: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    fast = torch.compile(made, fullgraph=True, backend=backend)
    with torch.no_grad():
        for rows in (1, 17):
            x = noise(rows, 1040, seed=rows)
            torch.testing.assert_close(fast(x), run(kernel, made, x))
    assert any("_scaled_mm" in call or "_int_mm" in call for call in calls), calls
