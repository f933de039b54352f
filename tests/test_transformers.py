"""Models of the transformers library, made from configurations, without a download."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mono_quant import AWQ, Quantizer, SlowPathWarning, TransformContext, load_model
from mono_quant.calibration import CalibrationData
from mono_quant.transforms.groups import find_groups
from tests.transforms.wirings import FOUR, targets_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

IDS = torch.arange(16).reshape(2, 8)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=2, vocab_size=100, n_positions=32, use_cache=False,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    assert isinstance(model, nn.Module)
    return model


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=100, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    assert isinstance(model, nn.Module)
    return model


def test_conv1d_layers_and_the_tied_head_of_gpt2_are_quantized(tmp_path: Path) -> None:
    result = Quantizer().fit([{"input_ids": IDS}]).apply(gpt2())
    rows = {row.name: row for row in result.report.quantized}
    assert {row.layer for row in rows.values()} == {"Embedding", "Conv1D"}
    assert rows["transformer.wte.weight"].aliases == ("lm_head.weight",)
    assert result.report.output_sqnr_db is not None
    assert result.report.output_sqnr_db > 30
    assert result.validate()

    path = result.save(tmp_path / "gpt2.safetensors")
    with torch.device("meta"):
        skeleton = gpt2()
    loaded = load_model(path, skeleton)
    assert torch.equal(loaded(IDS).logits, result.model(IDS).logits)


def test_the_result_keeps_its_class_and_its_generate() -> None:
    source = gpt2()
    model = Quantizer().apply(source).model
    assert type(model) is type(source)
    generate: object = getattr(model, "generate")  # noqa: B009  # nn.Module has no such method
    assert callable(generate)
    generated = generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4)
    assert generated.shape == (2, 12)


def test_a_llama_at_four_bits_keeps_its_embedding_and_a_skipped_head_in_float() -> None:
    result = Quantizer().bits(4).skip("lm_head").fit([{"input_ids": IDS}]).apply(llama())
    reasons = {row.name: row.reason for row in result.report.kept}
    assert reasons["lm_head.weight"] == "skipped"
    assert "embeddings" in (reasons["model.embed_tokens.weight"] or "")
    assert len(result.report.quantized) == 14
    assert result.validate()


def test_a_model_that_reads_a_weight_by_attribute_works_and_is_warned_of() -> None:
    config = transformers.T5Config(
        num_layers=1, d_model=32, d_ff=64, d_kv=16, num_heads=2, vocab_size=100, use_cache=False
    )
    source = transformers.T5ForConditionalGeneration(config).eval()
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    with pytest.warns(SlowPathWarning, match="read by attribute"):
        result = Quantizer().fit([batch]).apply(source)
    assert result.report.output_sqnr_db is not None
    assert result.report.output_sqnr_db > 25


def test_channels_of_llama_are_scaled_as_the_data_shows_since_its_code_cannot_be_traced() -> None:
    torch.manual_seed(0)
    model = llama().double()
    data = CalibrationData.bind([{"input_ids": IDS}])
    context = TransformContext(data.outputs, targets_of(model, FOUR))
    groups, _ = find_groups(model, context)
    layer = "model.layers.1"
    found = {one.source: one.layers for one in groups if one.source.startswith(layer)}
    assert found == {
        f"{layer}.input_layernorm": tuple(f"{layer}.self_attn.{one}_proj" for one in "qkv"),
        f"{layer}.post_attention_layernorm": (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"),
        f"{layer}.self_attn.v_proj": (f"{layer}.self_attn.o_proj",),
        f"{layer}.mlp.up_proj": (f"{layer}.mlp.down_proj",),
    }
    with torch.no_grad():
        before = model(IDS).logits
        changes = AWQ(steps=4).apply(model, context)
        after = model(IDS).logits
    assert sum(one.done for one in changes) > 4
    assert all("only the data shows" in one.text for one in changes if one.done)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)  # its norms compute in float32
