"""llm-compressor: GPTQ, block after block, on the models of transformers with the same weights.

Texts are given one by one, so that none is padded. Its scales are kept in float32 here, and counted
as the float16 that they are saved in with a model of that width.
"""

import importlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from tests.benchmarks.weight_only import transformers_bert, transformers_llama
from tests.benchmarks.weight_only.package import (
    Grid,
    Offer,
    Package,
    Quantize,
    Quantized,
    Read,
    Task,
    Way,
)


class _Twin(NamedTuple):
    """A network as it is known to transformers.

    Attributes:
        build: makes it.
        texts: returns the ids of each text.
        weights_of: returns what became of its weights.
        block: class of its blocks.
        ignored: Linears that stay float.
    """

    build: Callable[[Task], nn.Module]
    texts: Callable[[Task], list[Tensor]]
    weights_of: Callable[[nn.Module, Task], Mapping[str, Tensor]]
    block: str
    ignored: tuple[str, ...] = ()


_TWINS: Mapping[str, _Twin] = {
    "minilm": _Twin(
        transformers_bert.bert,
        transformers_bert.texts,
        transformers_bert.weights_of,
        "BertLayer",
    ),
    "smollm2": _Twin(
        transformers_llama.llama,
        transformers_llama.rows,
        transformers_llama.weights_of,
        "LlamaDecoderLayer",
        ("lm_head",),
    ),
}


def _gptq(observer: str) -> Way:
    def way(task: Task, grid: Grid) -> Quantize:
        llmcompressor: Any = importlib.import_module("llmcompressor")
        gptq: Any = importlib.import_module("llmcompressor.modifiers.gptq")
        datasets: Any = importlib.import_module("datasets")
        twin = _TWINS[task.network]
        model: Any = twin.build(task)
        tokenizer = transformers_bert.padding()
        rows = [ids[0].tolist() for ids in twin.texts(task)]
        masks = [[1] * len(row) for row in rows]
        samples = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": masks})
        weights = {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": grid.group,
            "observer": observer,
        }
        group = {"targets": ["Linear"], "weights": weights}
        modifier = gptq.GPTQModifier(config_groups={"all": group}, ignore=list(twin.ignored))

        def quantize() -> Read:
            with tempfile.TemporaryDirectory(prefix="mono_quant_") as folder:
                model.config.save_pretrained(folder)  # it reads the configuration there again
                model.config._name_or_path = folder
                llmcompressor.oneshot(
                    model=model,
                    processor=tokenizer,
                    dataset=samples,
                    recipe=modifier,
                    max_seq_length=max(map(len, rows)),
                    num_calibration_samples=len(rows),
                    batch_size=1,
                    shuffle_calibration_samples=False,
                    pipeline="sequential",
                    sequential_targets=[twin.block],
                )
            return lambda: Quantized(twin.weights_of(model, task), grid.size(16 + grid.bits))

        return quantize

    return way


PACKAGE = Package(
    "llm-compressor 0.14.0.1",
    ("llmcompressor==0.14.0.1", "transformers==5.17.0", "huggingface_hub==1.33.0"),
    {
        "GPTQ": Offer(_gptq("memoryless_minmax")),
        "GPTQ, MSE": Offer(_gptq("memoryless_mse")),
    },
)
