"""MiniLM as transformers' BertModel, for packages that know no other models."""

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mono_quant.demo.minilm import published_names
from tests.benchmarks.weight_only.package import Task


def bert(task: Task) -> nn.Module:
    """Return MiniLM with the same weights, without a pooler, whose blocks are `encoder.layer`."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        use_cache=False,
    )
    model: nn.Module = transformers.BertModel(config, add_pooling_layer=False)
    named = published_names()
    state = {}
    for name, value in task.model.state_dict().items():
        module, _, kind = name.rpartition(".")
        state[f"{named[module]}.{kind}"] = value
    model.load_state_dict(state, strict=False)  # all but which positions there are
    return model.eval()


def padding() -> object:
    """Return a tokenizer that knows the token of padding alone: all that is asked of one here."""
    transformers: Any = importlib.import_module("transformers")
    tokenizers: Any = importlib.import_module("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0}))
    tokenizer: object = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]"
    )
    return tokenizer


def texts(task: Task) -> list[Tensor]:
    """Return the ids of each text by itself, ``[1, T]``, without padding."""
    return [
        row[real][None] for ids, mask in task.batches for row, real in zip(ids, mask, strict=True)
    ]


def weights_of(model: nn.Module, task: Task) -> Mapping[str, Tensor]:
    """Return the weights that were quantized, by their names in the task's model."""
    named = published_names()
    return {
        f"{name}.weight": model.get_parameter(f"{named[name]}.weight").detach()
        for name in task.names
    }
