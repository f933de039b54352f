"""Models that transformers' `AutoModel` makes from a configuration, in place and from files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mono_quant import CheckpointError, Quantizer, load_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

IDS = torch.arange(16).reshape(2, 8)


def configuration(*, tied: bool = True) -> Any:
    return transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=100, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=tied,
    )  # fmt: skip


def decoder(*, tied: bool = True) -> Any:
    return transformers.AutoModelForCausalLM.from_config(configuration(tied=tied)).eval()


def written(model: Any) -> Tensor:
    mask = torch.ones_like(IDS)
    ids: Tensor = model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False)
    return ids


def test_a_decoder_quantized_in_place_is_the_same_object_and_generates() -> None:
    model = decoder()
    kind, config = type(model), model.config
    result = Quantizer().apply_(model)
    assert result.model is model
    assert type(model) is kind
    assert model.config is config
    assert len(result.report.quantized) == 15
    assert written(model).shape == (2, 12)


def test_a_copy_keeps_class_and_configuration_and_is_near_the_original() -> None:
    model = decoder()
    result = Quantizer().fit([{"input_ids": IDS}]).apply(model)
    assert type(result.model) is type(model)
    assert result.model.config.to_dict() == model.config.to_dict()
    assert result.report.output_sqnr_db is not None
    assert result.report.output_sqnr_db > 25
    assert result.validate()


def test_an_encoder_of_auto_model_is_quantized_in_place() -> None:
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2,
        vocab_size=100,
    )  # fmt: skip
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        before = model(IDS).last_hidden_state
        Quantizer().apply_(model)
        after = model(IDS).last_hidden_state
    assert not torch.equal(after, before)
    assert float((after - before).norm() / before.norm()) < 0.05


def test_a_file_and_a_saved_configuration_come_back_as_the_same_model(tmp_path: Path) -> None:
    result = Quantizer().apply(decoder())
    path = result.save(tmp_path / "model.safetensors")
    configuration().save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config)
    loaded = load_model(path, skeleton).eval()
    assert torch.equal(loaded(IDS).logits, result.model(IDS).logits)
    assert torch.equal(written(loaded), written(result.model))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_save_pretrained_refuses_a_quantized_model(tied: bool, tmp_path: Path) -> None:
    result = Quantizer().apply(decoder(tied=tied))
    loaded = load_model(result.save(tmp_path / "q.safetensors"), decoder(tied=tied))
    for model in (result.model, loaded, result.model.model):
        with pytest.raises(CheckpointError, match=r"save it with result\.save\(path\)"):
            model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    decoder(tied=tied).save_pretrained(tmp_path / "folder")  # the class is as it was


def test_from_pretrained_takes_no_file_of_ours_for_a_model_by_another_name(tmp_path: Path) -> None:
    Quantizer().apply(decoder()).save(tmp_path / "quantized.safetensors")
    configuration().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_save_pretrained_keeps_a_dequantized_model(tmp_path: Path) -> None:
    floats = Quantizer().apply(decoder()).dequantize()
    floats.save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read(IDS).logits, floats(IDS).logits)
