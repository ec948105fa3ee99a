"""Nothing is replaced in another package that the registry does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.structure.replacing import replaced_elsewhere

ROOT = Path(__file__).resolve().parents[2]

# What stands outside of the registry: (file, what it does) -> the reason.
EXCUSED = {
    ("megatron/mimo/backend/exact.py", "assigns to torch.backends.cudnn.allow_tf32, of"): (
        "a switch that torch offers"
    ),
    ("megatron/mimo/backend/torch_view.py", "writes into vars(view)"): "the copy is this project's",
    ("megatron/mimo/backend/gloo.py", "calls setattr on options"): "made two lines above",
    ("megatron/mimo/encoders/qwen2_5_vl_attention.py", "assigns a function to attention.core"): (
        "a specification of layers, made for this model"
    ),
    ("megatron/mimo/encoders/internvit.py", "assigns a function to attention."): (
        "a specification of layers, made for this model"
    ),
    ("megatron/mimo/layers/specs.py", "calls setattr on part"): (
        "a specification of layers, made for this model"
    ),
    ("megatron/mimo/inference/whole_sequences.py", "calls setattr on owner"): (
        "settings of this model, put back when the block ends"
    ),
    ("megatron/mimo/inference/whole_sequences.py", "calls setattr on module"): "the same",
    ("megatron/mimo/inference/whole_sequences.py", "calls delattr on module"): "the same",
}


def test_what_is_replaced_is_in_the_registry() -> None:
    files = sorted((ROOT / "megatron").rglob("*.py")) + sorted((ROOT / "examples").rglob("*.py"))
    assert files
    seen, complaints = set(), []
    for path in files:
        where = str(path.relative_to(ROOT))
        for complaint in replaced_elsewhere(path.read_text(encoding="utf-8"), where):
            what = complaint.partition(": ")[2]
            excuses = {key for key in EXCUSED if key[0] == where and what.startswith(key[1])}
            seen |= excuses
            if not excuses:
                complaints.append(complaint)
    assert complaints == []
    assert seen == EXCUSED.keys(), "an excuse that nothing needs"


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("from megatron.training import training\ntraining.train = 3", "self.train = 3"),
        ("from a.b import C\nC.method = 3", "from megatron.mimo.lora import C\nC.method = 3"),
        ("import torch.cuda\ntorch.cuda.is_available = f", "import torch\nx = torch.ones(2)"),
        ("def f():\n    import sys\n    sys.argv = []", "import sys\nwords = sys.argv"),
        ("import a\ndel a.name", "del self.name"),
        ("import a\nx, a.name = a.name, None", "import a\nx, y = a.name, None"),
        ("setattr(machine, name, value)", "setattr(self, name, value)"),
        ("delattr(machine, name)", "getattr(machine, name)"),
        ("vars(module)['name'] = 3", "vars(module)['name']"),
        ("optimizer.step = lambda: None", "optimizer.rate = 3"),
        ("optimizer.step = partial(f, 3)", "optimizer.step = steps"),
        ("def f(): ...\nparser.error = f", "def f(): ...\nparser.error = g"),
        ("layer.__class__ = Other", "kind = layer.__class__"),
    ],
)
def test_the_rule_tells_bad_from_good(bad: str, good: str) -> None:
    assert len(replaced_elsewhere(bad, "x.py")) == 1
    assert replaced_elsewhere(good, "x.py") == []
