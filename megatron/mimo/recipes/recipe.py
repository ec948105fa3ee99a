"""What a recipe is: one value that holds a whole run.

A recipe is returned by a function (``recipes/digits.py: digits()``) and consumed by
``megatron.mimo.training``. It never reads global state: everything it needs arrives as the parsed
Megatron arguments (an ``argparse.Namespace``) and the ``Places`` of the model's modules.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.mimo.data.micro_batches.batch import Batch, Collator

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from megatron.core.models.mimo import MimoModel, MimoModelConfig
    from megatron.mimo.data.global_batches.planned_batches import SampleSources
    from megatron.mimo.data.sample import Sample
    from megatron.mimo.models.common.place import Places


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """Map-style datasets of ``Sample``; index i always gives the same sample, on every rank.

    Training may read records in files instead, in the order of a mixture of sources.
    """

    train: Dataset[Sample] | SampleSources | None
    valid: Dataset[Sample] | None
    test: Dataset[Sample] | None


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What ``Recipe.finish`` is called with once training has ended, on every rank.

    Attributes:
        arguments: the parsed Megatron arguments.
        model: this rank's model chunks, unwrapped (no DDP, no Float16Module).
        generate: greedy decoding, ``generate(samples, max_new_tokens, stop_token) -> list of
            token-id lists`` (one per sample, prompt excluded). Collective: every rank calls it
            with the same samples and every rank gets the answer.
        train_seconds: wall-clock seconds spent in training iterations of this process.
        samples_per_second: training throughput over those iterations, whole job.
        loss_curve: (iteration, training loss) pairs, oldest first, of the whole run.
        output: the run directory (``--save``'s parent run folder), or None when nothing is kept.
    """

    arguments: Namespace
    model: Sequence[MimoModel]
    generate: Callable[[Sequence[Sample], int, int | None], list[list[int]]]
    train_seconds: float
    samples_per_second: float
    loss_curve: Sequence[tuple[int, float]]
    output: Path | None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: model, data, defaults.

    Attributes:
        name: what ``--recipe`` takes.
        summary: one line for ``--list-recipes``.
        arguments: defaults for Megatron's own arguments, keyed by argparse destination
            (``{"num_layers": 4}``); a flag on the command line or a ``--config`` file wins.
        presets: arguments that ``--stage NAME`` adds, by that name; stronger than ``arguments``.
        default_preset: the preset of a run without the flag; None for none.
        describe: defaults that follow from what flags name (such as the configuration in the
            folder of ``--load``), weaker than ``arguments``. It gets the flags as far as they are
            known by then: given on the command line, in ``--config``, or derived (``load``,
            ``save``, ``output``). May refuse them with a ``ConfigError``.
        require: refuses a run without the files that it reads (``ConfigError``); called before
            ``describe``, with the same flags.
        check: refuses arguments that do not fit its data, once all are known (``ConfigError``).
        data_flags: which of ``data_path``, ``train_data_path``, ``valid_data_path`` and
            ``test_data_path`` it reads; the others are refused.
        add_arguments: adds the recipe's own flags to the parser (prefix them with the name).
        build_model: the model's configuration on one rank.
        build_datasets: datasets for (train, valid, test) sample counts.
        build_collator: the function that turns a list of samples into one micro-batch.
        task_metric: per-microbatch evaluation beside the loss:
            ``(logits_BSV, batch) -> {metric: (sum, count)}`` with 0-d tensors, summed over the
            whole evaluation before the division; None for none.
        finish: evaluates and reports when training ends; returns the content of metrics.json.
        hf_config: makes the Hugging Face configuration of the model that is trained where no folder
            brings one; None for a model that is none of Hugging Face's.
        save_assets: puts what a checkpoint needs besides weights into the ``--save`` folder.
            Called on rank 0 before training.
    """

    name: str
    summary: str
    arguments: Mapping[str, object]
    build_model: Callable[[Namespace, Places], MimoModelConfig]
    build_datasets: Callable[[Namespace, tuple[int, int, int]], Datasets]
    build_collator: Callable[[Namespace], Collator]
    add_arguments: Callable[[ArgumentParser], None] | None = None
    task_metric: Callable[[Any, Batch], dict[str, tuple[Any, Any]]] | None = None
    finish: Callable[[FinishedRun], dict[str, Any]] | None = None
    presets: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    default_preset: str | None = None
    describe: Callable[[Namespace], Mapping[str, object]] | None = None
    require: Callable[[Namespace], None] | None = None
    check: Callable[[Namespace], None] | None = None
    data_flags: Sequence[str] = ()
    hf_config: Callable[[], Any] | None = None
    save_assets: Callable[[Namespace, Path], None] | None = None
