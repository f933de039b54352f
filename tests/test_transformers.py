"""Models of the transformers library, made from configurations, without a download."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mono_quant import Quantizer, SlowPathWarning, load_model

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
