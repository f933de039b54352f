"""The 4-bit kernels: torch's own product in bfloat16, and panels that are decoded in float32."""

import pytest
import torch
from torch import Tensor, nn

from mono_quant import QuantizedLayer, Quantizer, kernels
from mono_quant.kernels import Int4, PanelBlocks, ops, trial
from mono_quant.kernels.ops import int4_panel
from mono_quant.kernels.panels import to_panels, to_rows
from tests.helpers import noise, same_bits, stack_and_step
from tests.kernels.cases import CPU, EPS, ROWS, exact, layer, run, spec_of

pytestmark = pytest.mark.skipif(isinstance(int4_panel(), str), reason=str(int4_panel()))

INT4, PANEL_BLOCKS = Int4(), PanelBlocks()
BITS4 = Quantizer().bits(4)
GRIDS = {
    "groups of 64": BITS4,
    "symmetric": BITS4.symmetric(),
    "groups of 32": BITS4.group_size(32),
    "groups of 128": BITS4.group_size(128),
    "groups of 256": BITS4.group_size(256),
    "groups of 384": BITS4.group_size(384),
    "float zero points": BITS4.float_zero_point(),
    "float zero points, groups of 384": BITS4.group_size(384).float_zero_point(),
    "per channel": BITS4.granularity("channel"),
    "per tensor": BITS4.granularity("tensor"),
}
SHAPE = (128, 768)
ROUND = 2.0**-8
"""Half a step of bfloat16 at 1, which a value above may be rounded by, as a share of it."""


def parts(made: QuantizedLayer, centre: int = 8) -> Tensor:
    """Return |code - centre| * scale + |centre - zero point| * scale of each weight, in float64."""
    weight = made.packed_weights()["weight"]
    q = weight.unpack()
    scale, zero = q.qparams.scale, q.qparams.zero_point
    assert scale is not None
    columns = weight.layout.stack[2] // scale.shape[2]
    steps = scale.double().repeat_interleave(columns, 2)  # [1, out or 1, in]
    codes = q.codes.double() - weight.scheme.code_min
    at_zero = zero.double().repeat_interleave(columns, 2) if zero is not None else 8.0
    return (((codes - centre).abs() + (centre - torch.as_tensor(at_zero)).abs()) * steps)[0]


@pytest.mark.parametrize(
    ("grid", "shape"), [*((grid, SHAPE) for grid in GRIDS), ("groups of 32", (64, 32))]
)
def test_the_products_own_error_is_that_of_rounding_to_bfloat16(
    grid: str, shape: tuple[int, int]
) -> None:
    made = layer(GRIDS[grid], *shape)
    assert INT4.supports(spec_of(made), CPU, torch.float32) is None
    size = parts(made)
    for rows in ROWS:
        x = noise(rows, shape[1], seed=rows)
        expected, _ = exact(made, x)
        # inputs, scales and offsets are rounded once each, then the result, and its sum in float32
        once = x.double().abs() @ size.t()
        room = (2 * ROUND + ROUND**2) * once + ROUND * (expected.abs() + 3 * ROUND * once)
        room += EPS * shape[1] * once
        assert ((run(INT4, made, x) - expected).abs() <= room).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_exact_inputs_and_scales_give_exact_sums(grid: str) -> None:
    made = layer(GRIDS[grid], *SHAPE)
    held = made.quantized_weights["weight"]
    with torch.no_grad():
        held.get_buffer("scale").fill_(0.5)
        if "float" in grid:
            held.get_buffer("zero_point").mul_(4).round_().div_(4)
    x = torch.randint(-1, 2, (5, SHAPE[1])).float()
    expected, _ = exact(made, x)
    assert torch.equal(run(INT4, made, x), expected.to(torch.bfloat16).float())


@pytest.mark.parametrize("grid", GRIDS)
def test_decoded_panels_are_the_product_of_what_the_codes_say(grid: str) -> None:
    made = layer(GRIDS[grid], *SHAPE)
    assert PANEL_BLOCKS.supports(spec_of(made), CPU, torch.float32) is None
    for rows in ROWS:
        x = noise(rows, SHAPE[1], seed=rows)
        expected, _ = exact(made, x)
        # codes are summed as they are stored, and what zero makes of them is taken off
        size = x.double().abs() @ parts(made, centre=0).t()
        room = EPS * (8 + SHAPE[1] ** 0.5) * size
        assert ((run(PANEL_BLOCKS, made, x) - expected).abs() <= room).all()


@pytest.mark.parametrize("length", [5120, 10240])
@pytest.mark.parametrize("quantizer", [BITS4, BITS4.granularity("channel"), BITS4.group_size(5120)])
def test_rows_longer_than_what_is_decoded_at_once(quantizer: Quantizer, length: int) -> None:
    made = layer(quantizer, 64, length)
    x = noise(9, length)
    expected, size = exact(made, x)
    found = run(PANEL_BLOCKS, made, x)
    assert ((found - expected).abs() <= EPS * 4 * length**0.5 * size + 1e-4).all()
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("kernel", [INT4, PANEL_BLOCKS])
def test_bias_is_added_and_leading_dimensions_and_dtypes_are_kept(
    kernel: Int4 | PanelBlocks,
) -> None:
    made = layer(BITS4, *SHAPE)
    bias, x = noise(SHAPE[0], seed=9), noise(2, 3, SHAPE[1])
    plain = run(kernel, made, x)
    assert plain.shape == (2, 3, SHAPE[0])
    assert plain.dtype == torch.float32
    assert same_bits(run(kernel, made, x, bias), plain + bias)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        assert same_bits(run(kernel, made, half), run(kernel, made, half.float()).to(dtype))
    assert same_bits(run(kernel, made, torch.stack([x, x], -1)[..., 0]), plain)
    assert run(kernel, made, x[:0]).shape == (0, 3, SHAPE[0])
    with pytest.raises(RuntimeError, match="rows are 768"):
        run(kernel, made, noise(2, 767))


@pytest.mark.parametrize("kernel", [INT4, PANEL_BLOCKS])
def test_the_default_dtype_has_no_say(kernel: Int4 | PanelBlocks) -> None:
    made, x = layer(BITS4, *SHAPE), noise(3, SHAPE[1])
    expected = run(kernel, made, x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = run(kernel, made, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(found, expected)


@pytest.mark.parametrize("kernel", [INT4, PANEL_BLOCKS])
def test_nan_stays_in_its_row(kernel: Int4 | PanelBlocks) -> None:
    x = noise(3, SHAPE[1])
    x[1, 5] = float("nan")
    found = run(kernel, layer(BITS4, *SHAPE), x)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_noise_on_a_normal_layer_is_far_below_that_of_four_bits() -> None:
    source = nn.Linear(1024, 512)
    made = BITS4.apply(source, progress=False).model
    assert isinstance(made, QuantizedLayer)
    x = torch.randn(64, 1024)
    expected, _ = exact(made, x)
    floats = x.double() @ source.weight.double().t()
    noises = [(run(INT4, made, x) - expected).square().sum(), (floats - expected).square().sum()]
    found, rounding = (10 * torch.log10(expected.square().sum() / one) for one in noises)
    assert found > 45 > rounding + 20  # independent roundings of 2^-9 each: about 50 dB


@pytest.mark.parametrize("half", [16, 32])
@pytest.mark.parametrize("shape", [(64, 32), (64, 1), (192, 10), (128, 65536)])
def test_panels_and_rows_hold_the_same_nibbles(half: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 256, (1, *shape), dtype=torch.uint8)
    panels = to_panels(codes, half)
    assert panels.shape == (shape[0] // (2 * half), 2 * shape[1], half)
    assert torch.equal(to_rows(panels), codes)
    k, j = 2 * shape[1] - 1, 3
    assert panels[0, k, j] & 15 == codes[0, j, -1] >> 4
    assert panels[0, k, j] >> 4 == codes[0, j + half, -1] >> 4
    assert panels[0, 0, j] & 15 == codes[0, j, 0] & 15


def test_panels_are_what_torch_packs() -> None:
    half = int4_panel()
    assert isinstance(half, int)
    codes = torch.randint(0, 16, (256, 96), dtype=torch.int32)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    small = codes.to(torch.uint8)
    canonical = (small[:, 0::2] | small[:, 1::2] << 4)[None]
    assert torch.equal(to_panels(canonical, half).flatten(), theirs.flatten())


@pytest.mark.parametrize(
    ("quantizer", "shape", "why"),
    [
        (Quantizer().bits(3), SHAPE, "3-bit"),
        (Quantizer().activations(None), SHAPE, "8-bit"),
        (Quantizer().bits(16), SHAPE, "float16"),
        (BITS4.group_size(16), SHAPE, "16 columns share a scale"),
        (BITS4, (100, 768), "100 rows are no multiple"),
    ],
)
def test_it_says_why_it_cannot(quantizer: Quantizer, shape: tuple[int, int], why: str) -> None:
    spec = spec_of(layer(quantizer, *shape))
    for kernel in (INT4, PANEL_BLOCKS):
        assert why in str(kernel.supports(spec, CPU, torch.float32))
        assert "float64" in str(kernel.supports(spec, CPU, torch.float64))
        assert "cuda" in str(kernel.supports(spec, torch.device("cuda"), torch.float32))


def test_torchs_product_takes_few_values_and_the_others_do_not() -> None:
    spec = spec_of(layer(BITS4, 64, 64))
    assert INT4.supports(spec, CPU, torch.float32) is None
    assert "too few" in str(PANEL_BLOCKS.supports(spec, CPU, torch.float32))


def test_a_machine_without_the_product_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(BITS4, *SHAPE)
    monkeypatch.setattr("mono_quant.kernels.int4.int4_panel", lambda: "no such luck")
    assert INT4.supports(spec_of(made), CPU, torch.float32) == "no such luck"
    with pytest.raises(RuntimeError, match="no such luck"):
        INT4.arrange(spec_of(made), made.packed_weights()["weight"])
    with torch.no_grad(), kernels.use("int4"):
        assert (
            kernels.select(spec_of(made), CPU, torch.float32, arrange=lambda: True).name
            == "reference"
        )


def test_an_order_that_is_not_known_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "refusal", lambda name, program: f"{name} failed")
    ops._int4_panel.cache_clear()
    try:
        assert int4_panel() == "the 4-bit product in panels of 32 rows failed"
    finally:
        ops._int4_panel.cache_clear()
    monkeypatch.undo()
    if isinstance(int4_panel(), int):
        wrong = f"half = {48 - int(int4_panel())}\n{ops._INT4_TRIAL}"
        assert "another order" in str(trial.refusal("an order of another machine", wrong))


def test_values_are_those_of_the_reference() -> None:
    made = layer(BITS4, *SHAPE)
    values, _ = stack_and_step(made.packed_weights()["weight"], SHAPE[1])
    eye = torch.eye(SHAPE[1])
    assert torch.allclose(
        run(PANEL_BLOCKS, made, eye).t().double(), values[0], rtol=1e-5, atol=1e-6
    )
