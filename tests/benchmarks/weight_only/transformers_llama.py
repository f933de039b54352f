"""SmolLM2 as transformers' LlamaForCausalLM, for packages that know no other models.

There the two values of a head that turn together lie half a head apart, and side by side here: rows
of queries and keys change places, which no grid of a row sees.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.weight_only.package import Task

_HEAD_WIDTH = 64
_LAYERS = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_TURNED = ("attention.query", "attention.key")


def llama(task: Task) -> nn.Module:
    """Return SmolLM2 with the same weights, whose blocks are `model.layers`."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    state = {}
    for key, value in task.model.state_dict().items():
        name = key.removesuffix(".weight")
        state[f"{_named(name)}.weight"] = _moved(name, value, _apart())
    model.load_state_dict(state)
    return model.eval()


def rows(task: Task) -> list[Tensor]:
    """Return the ids of each window by itself, ``[1, T]``."""
    return [row[None] for (ids,) in task.batches for row in ids]


def weights_of(model: nn.Module, task: Task) -> Mapping[str, Tensor]:
    """Return the weights that were quantized, by their names in the task's model."""
    back = _apart().argsort()
    return {
        f"{name}.weight": _moved(name, model.get_parameter(f"{_named(name)}.weight").detach(), back)
        for name in task.names
    }


def _named(name: str) -> str:
    """Return what a module of the task's model is called there."""
    if name in _OUTER:
        return _OUTER[name]
    _, place, layer = name.split(".", 2)
    return f"model.layers.{place}.{_LAYERS[layer]}"


def _apart() -> Tensor:
    """Return the rows of a head in the order in which they lie there."""
    return torch.arange(_HEAD_WIDTH).view(-1, 2).t().flatten()


def _moved(name: str, weight: Tensor, order: Tensor) -> Tensor:
    """Return a weight with the rows of each head in an order, where it makes queries or keys."""
    if not name.endswith(_TURNED):
        return weight
    return weight.view(-1, _HEAD_WIDTH, weight.shape[1])[:, order].reshape(weight.shape)
