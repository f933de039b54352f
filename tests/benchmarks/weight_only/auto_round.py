"""auto-round: SignRound, 200 steps a block (its default) on MiniLM as transformers' BertModel.

It takes samples of one length alone, so texts are padded to 256 tokens and masked; its loss leaves
out what its tokenizer calls padding, which is all that this tokenizer says.
"""

import importlib
from typing import Any

from tests.benchmarks.weight_only.package import (
    Grid,
    Offer,
    Package,
    Quantize,
    Quantized,
    Read,
    Task,
)
from tests.benchmarks.weight_only.transformers_bert import bert, padding, weights_of


def _way(task: Task, grid: Grid) -> Quantize:
    auto_round: Any = importlib.import_module("auto_round")
    model, tokenizer, length = bert(task), padding(), task.batches[0][0].shape[1]
    samples = [{"input_ids": ids, "attention_mask": mask.long()} for ids, mask in task.batches]

    def quantize() -> Read:
        rounding = auto_round.AutoRound(
            model,
            tokenizer=tokenizer,
            bits=grid.bits,
            group_size=grid.group,
            sym=False,
            dataset=samples,
            nsamples=sum(len(ids) for ids, _ in task.batches),
            seqlen=length,
            batch_size=len(task.batches[0][0]),
            device_map="cpu",
            amp=False,
        )
        found, _ = rounding.quantize()
        return lambda: Quantized(weights_of(found, task), grid.size(16 + grid.bits))

    return quantize


PACKAGE = Package(
    "auto-round 0.16.1",
    ("auto-round==0.16.1",),
    {"SignRound, 200 steps": Offer(_way, networks=("minilm",))},
)
