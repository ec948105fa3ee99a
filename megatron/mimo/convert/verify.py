"""Verifies that a checkpoint is the Hugging Face model: names, values, logits, gradients."""

from __future__ import annotations

import filecmp
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.backend.exact import forbid_tf32
from megatron.mimo.checkpoints.folders import ASSETS
from megatron.mimo.checkpoints.inspection import Inspector
from megatron.mimo.checkpoints.match import check_spellings
from megatron.mimo.checkpoints.torch_dist import locate
from megatron.mimo.convert.compare import Comparison
from megatron.mimo.convert.compare_files import SHOWN, Finding, compare_config, compare_weights
from megatron.mimo.convert.conversations import coverage
from megatron.mimo.convert.exporting import export_model
from megatron.mimo.convert.importing import import_model
from megatron.mimo.convert.processes import compare_on_processes
from megatron.mimo.convert.reference import NEW_TOKENS, Expected, compute_expected
from megatron.mimo.convert.ties import config_of_files
from megatron.mimo.convert.weights import Weights
from megatron.mimo.inference.rules import Rules
from megatron.mimo.inference.settings import read_rules
from megatron.mimo.lora.settings import saved_settings
from megatron.mimo.models import family_of, load_family, read_hf_config

__all__ = ["Allowed", "Finding", "verify_checkpoint", "verify_tiny"]

_SEED = 2


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """Largest differences that pass.

    Attributes:
        logits: absolute.
        gradients: norm of the difference relative to that of the gradient.
    """

    logits: float = 1e-4
    gradients: float = 1e-3


def verify_checkpoint(
    source: Path,
    checkpoint: Path,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    samples: int = 2,
    weights_only: bool = False,
    allowed: Allowed | None = None,
    changes: Mapping[str, object] | None = None,
    hashes: bool = True,
) -> list[Finding]:
    """Compare a checkpoint with a Hugging Face directory.

    Args:
        source: the directory.
        checkpoint: root or iteration folder.
        tp_size: tensor-parallel size under which the checkpoint is loaded.
        pp_size: pipeline-parallel size.
        samples: random conversations that both models read, in fp32.
        weights_only: compare the files only; neither model is built.
        allowed: what passes.
        changes: of our model, as ``model_settings`` takes them (``{"transformer_impl": "local"}``).
        hashes: compare the checkpoint's files with the hashes that were written with them.

    Raises:
        ConfigError, UnsupportedError, InputError: one of both cannot be read.
    """
    forbid_tf32()
    root, folder = locate(checkpoint, inspector=Inspector(hashes=hashes))
    said, ours = read_hf_config(source), read_hf_config(root / ASSETS)
    family = family_of(said)
    if family.name != family_of(ours).name:
        raise ConfigError(f"{source} is a {family.name}, {root} is not; name those of one model")
    config, _ = config_of_files(family, said, Weights(source), source=str(source))
    findings = [
        compare_config(config, ours),
        *compare_weights(family, config, source, folder),
    ]
    if weights_only:
        return findings
    if saved_settings(folder) is not None:
        raise ConfigError(
            f"{folder} has adapters, which the comparison of logits does not load; export it, "
            "import the result and verify that, or pass --weights-only"
        )
    with torch.device("meta"):
        described: Any = family.reference(config)
    model = type(described).from_pretrained(source, dtype=torch.float32).eval()
    for name, parameter in described.named_parameters():  # loading makes fixed tables trainable
        model.get_parameter(name).requires_grad_(parameter.requires_grad)
    shapes = {name: parameter.shape for name, parameter in described.named_parameters()}
    check_spellings(shapes, family.keys(config))
    rules = read_rules(source)
    expected = compute_expected(model, family, config, samples=samples, seed=_SEED, rules=rules)
    del model
    found = compare_on_processes(
        family, config, folder, expected, tp_size=tp_size, pp_size=pp_size, changes=changes
    )
    return [
        *findings,
        _coverage(family, config, expected),
        *_compare_runs(expected, found, allowed or Allowed()),
    ]


def verify_tiny(
    name: str, *, tp_size: int = 1, pp_size: int = 1, changes: Mapping[str, object] | None = None
) -> list[Finding]:
    """Take a small random model of a family all the way there and back.

    Makes a Hugging Face directory, imports it, compares under the layout, exports it, compares the
    files byte for byte and loads them in transformers; all in a temporary folder.

    Args:
        name: of the family.
        tp_size: tensor-parallel size.
        pp_size: pipeline-parallel size.
        changes: of our model, as ``model_settings`` takes them.
    """
    forbid_tf32()
    family = load_family(name)
    config: Any = family.tiny()
    with tempfile.TemporaryDirectory(prefix="mimo-verify-") as temporary:
        made, imported, exported = (Path(temporary) / part for part in ("hf", "mimo", "back"))
        torch.manual_seed(_SEED)
        model: Any = family.reference(config)
        with torch.no_grad():
            for parameter in model.parameters():  # biases begin at 0, norms at 1: hide nothing
                parameter += 0.05 * torch.randn_like(parameter)
        size = sum(parameter.nbytes for parameter in model.parameters())
        model.save_pretrained(made, max_shard_size=max(size // 3, 1))
        import_model(made, imported, shown=False)
        findings = verify_checkpoint(
            made, imported, tp_size=tp_size, pp_size=pp_size, changes=changes
        )
        export_model(imported, exported, shown=False)
        findings.append(_compare_files(made, exported))
        findings.append(_reload(model, exported))
    return findings


def _coverage(family: Any, config: Any, expected: Expected) -> Finding:
    """Whether the conversations that both models have read reach all parts of them."""
    covered = coverage(family, config, expected.examples)
    gradients, table = family.keys(config).laid_out(expected.gradients)
    reached = {table.canonical(name) for name, grad in gradients.items() if grad.any()}
    reached |= {copy for name, copy in table.tied if name in reached}
    fixed = {table.canonical(name) for name in expected.fixed}
    trained = [name for row in table.each() for name in row.hf if name not in fixed]
    idle = [f"{name} has no gradient" for name in trained if name not in reached]
    rows = (*covered.missing, *idle)
    text = f"{covered.text}; {len(trained) - len(idle)} of {len(trained)} weights have a gradient"
    return Finding(title="coverage", text=text, equal=not rows, rows=rows[:SHOWN])


def _compare_runs(expected: Expected, found: list[Comparison], allowed: Allowed) -> list[Finding]:
    logits = max(value for one in found for value in one.logits)
    losses = [one.loss for one in found if one.loss is not None]
    lengths = [len(logits_LV) for logits_LV in expected.logits]
    errors = _gradient_errors(found)
    worst = sorted(errors.items(), key=lambda item: -item[1])
    wrong = [name for name, error in worst if not error < allowed.gradients]
    same = sum(
        ours == theirs for ours, theirs in zip(found[0].answers, expected.answers, strict=True)
    )
    return [
        Finding(
            title="logits",
            text=f"largest difference {logits:.1e} (allowed {allowed.logits:.0e}) over "
            f"{len(lengths)} samples of {', '.join(map(str, lengths))} tokens; loss "
            f"{losses[0]:.5f}, in transformers {expected.loss:.5f}",
            equal=logits < allowed.logits,
        ),
        Finding(
            title="gradients",
            text=f"of {len(errors)} parameters, {len(wrong)} differ by more than "
            f"{allowed.gradients:.0e}; the largest differences:",
            equal=not wrong,
            rows=tuple(f"{error:.1e}  {name}" for name, error in worst[: SHOWN if wrong else 3]),
        ),
        Finding(
            title="generation",
            text=f"{same} of {len(lengths)} greedy answers of {NEW_TOKENS} tokens are equal"
            + (f", with {_said(expected.rules)}" if expected.rules != Rules() else ""),
            equal=same == len(lengths),
        ),
    ]


def _said(rules: Rules) -> str:
    """The rules that are not the default."""
    return ", ".join(
        f"{one.name} {getattr(rules, one.name)}"
        for one in fields(Rules)
        if getattr(rules, one.name) != one.default
    )


def _gradient_errors(found: list[Comparison]) -> Mapping[str, float]:
    """Relative differences over all ranks, each rank's parts against the whole gradient."""
    squares: dict[str, float] = defaultdict(float)
    norms: dict[str, float] = {}
    for one in found:
        for name, difference in one.gradients.items():
            squares[name] += difference.squares
            norms[name] = difference.norm_squares
    return {
        name: (total / norms[name]) ** 0.5 if norms[name] else float("inf") if total else 0.0
        for name, total in squares.items()
    }


def _compare_files(made: Path, exported: Path) -> Finding:
    names = {path.name for folder in (made, exported) for path in folder.iterdir()}
    same, _, _ = filecmp.cmpfiles(made, exported, names, shallow=False)
    different = sorted(names - set(same))
    return Finding(
        title="export",
        text=f"{len(same)} of {len(names)} files equal byte for byte",
        equal=not different,
        rows=tuple(different[:SHOWN]),
    )


def _reload(model: Any, exported: Path) -> Finding:
    loaded, told = type(model).from_pretrained(exported, output_loading_info=True)
    wrong = [f"{kind}: {names}" for kind, names in told.items() if names]
    theirs = loaded.state_dict()
    wrong += [
        f"{name} differs"
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, theirs[name])
    ]
    return Finding(
        title="reload",
        text=f"transformers loads the exported directory as {type(loaded).__name__}",
        equal=not wrong,
        rows=tuple(wrong[:SHOWN]),
    )
