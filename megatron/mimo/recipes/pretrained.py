"""Recipes for models that come from Hugging Face: configuration, processor, conversations.

The model is described by the first of these that there is: the configuration beside the
checkpoint that is loaded (``<load>/hf/config.json``), that in the folder of ``--hf``, the recipe's
own. The processor is looked for in the same places. Weights come from ``--load`` alone.
"""

from __future__ import annotations

import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.checkpoints.assets import (
    ASSET_HASHES,
    CONFIG,
    PROCESSOR,
    asset_folders,
    end_tokens,
    hash_assets,
    loaded_assets,
    read_processor,
    write_assets,
)
from megatron.mimo.checkpoints.folders import ASSETS, TRACKER, no_checkpoint
from megatron.mimo.checkpoints.tracker import holds_checkpoint
from megatron.mimo.data.chat.chat import Chat
from megatron.mimo.data.chat.dataset import ChatDataset
from megatron.mimo.data.global_batches.planned_batches import SampleSources
from megatron.mimo.data.reading.record_dataset import RecordDataset
from megatron.mimo.data.reading.sample_measurer import SampleMeasurer
from megatron.mimo.data.reading.sample_reader import SampleReader
from megatron.mimo.data.sources import files_of, open_file
from megatron.mimo.models import family_of, load_family, read_hf_config
from megatron.mimo.models.common.family import sample_collator
from megatron.mimo.models.common.settings import WHOLE_LOGITS
from megatron.mimo.recipes.costs import cost_model
from megatron.mimo.recipes.data_flags import (
    add_data_arguments,
    check_data,
    index_folder,
    training_mixture,
)
from megatron.mimo.recipes.described import refuse_other_model
from megatron.mimo.recipes.language import language_settings
from megatron.mimo.recipes.media_flags import (
    MEDIA_FILE,
    VIDEO_FPS,
    add_media_arguments,
    keep_media_settings,
    media_limits,
)
from megatron.mimo.recipes.reading_flags import (
    add_policy_arguments,
    add_reading_arguments,
    bad_sample_policy,
    reading_options,
)
from megatron.mimo.recipes.recipe import Datasets, FinishedRun, Recipe

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModelConfig
    from megatron.mimo.data import SampleCollator
    from megatron.mimo.data.chat.chat import Chat
    from megatron.mimo.data.conversation import Conversation
    from megatron.mimo.models.common.place import Places

__all__ = ["Task", "pretrained"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Conversations that a tiny model learns from, in place of files.

    Attributes:
        train, valid: conversations for a processor's configuration; equal for equal seeds.
        answer_tokens: no answer has more, its end included.
    """

    train: Callable[[], Sequence[Conversation]]
    valid: Callable[[], Sequence[Conversation]]
    answer_tokens: int


def pretrained(
    *,
    name: str,
    summary: str,
    family: str,
    config: Callable[[], Any],
    arguments: Mapping[str, object],
    presets: Mapping[str, Mapping[str, object]],
    default_preset: str = "full",
    processor: Callable[[Any], Any] | None = None,
    task: Task | None = None,
) -> Recipe:
    """A recipe of a model family.

    Args:
        name: of the recipe.
        summary: one line.
        family: of ``megatron.mimo.models``.
        config: the Hugging Face configuration, where no checkpoint brings one.
        arguments: of training. Those of the model follow from the configuration.
        presets: as in ``Recipe``.
        default_preset: one of them.
        processor: makes a processor for a configuration, where no folder has one; None requires
            a folder.
        task: what is trained on without ``--data-path``; None requires the flag. With it the run
            ends by generating answers to the conversations of ``task.valid``.
    """
    run = _Run(name=name, family=family, config=config, processor=processor, task=task)
    return Recipe(
        name=name,
        summary=summary,
        arguments=arguments,
        presets=presets,
        default_preset=default_preset,
        require=partial(_require, run),
        describe=run.describe,
        check=run.check,
        data_flags=("data_path", "train_data_path", "valid_data_path"),
        add_arguments=_add_arguments,
        build_model=run.build_model,
        build_datasets=run.build_datasets,
        build_collator=run.build_collator,
        finish=None if task is None else run.finish,
        hf_config=config,
        save_assets=run.save_assets,
    )


def _add_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group(title="conversations")
    group.add_argument(
        "--hf",
        metavar="DIR",
        help="Hugging Face directory with the model's processor and config.json (default: hf/ in "
        "the folder of --load); no weights are read from it",
    )
    add_reading_arguments(parser)
    group.add_argument(
        "--whole-logits",
        type=int,
        default=WHOLE_LOGITS // 2**20,
        metavar="MB",
        help="above so many megabytes of fp32 logits of a micro-batch, on a rank, the loss is "
        "computed piece by piece, without ever holding all of them (0: always)",
    )
    group.add_argument(
        "--router-aux-loss-coef",
        type=float,
        metavar="WEIGHT",
        help="weight of the loss that balances experts over all layers, as transformers computes "
        "it (default: that of config.json where output_router_logits is true, else 0)",
    )
    add_policy_arguments(parser)
    add_media_arguments(parser, video_fps=VIDEO_FPS)
    add_data_arguments(parser)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The parts of a recipe that need the model's description."""

    name: str
    family: str
    config: Callable[[], Any]
    processor: Callable[[Any], Any] | None
    task: Task | None
    _known: dict[str, Any] = field(default_factory=dict)  # read from disk once per run

    def describe(self, given: Namespace) -> Mapping[str, object]:
        """Megatron's arguments of the model."""
        return load_family(self.family).arguments(self._config(given))

    def check(self, args: Namespace) -> None:
        """Refuses an evaluation without conversations, and conversations without an evaluation."""
        check_data(args)
        if args.eval_iters and self.task is None and not args.valid_data_path:
            raise ConfigError(
                f"--eval-iters {args.eval_iters}: recipe {self.name!r} has no validation data; "
                "give --valid-data-path held_out.jsonl, or --eval-iters 0"
            )
        if args.valid_data_path and not args.eval_iters:
            raise ConfigError(
                f"--valid-data-path {' '.join(args.valid_data_path)} is never read without an "
                "evaluation; give --eval-iters N as well"
            )

    def build_model(self, args: Namespace, places: Places) -> MimoModelConfig:
        """As the family builds it."""
        return load_family(self.family).build(self._config(args), language_settings(args), places)

    def build_datasets(self, args: Namespace, counts: tuple[int, int, int]) -> Datasets:
        """Records in files in the order of their mixture, or the conversations of the task.

        Those of validation come in their own order.
        """
        train, valid, _ = counts
        return Datasets(
            train=self._for_training(args, train) if train else None,
            valid=self._for_validation(args) if valid else None,
            test=None,
        )

    def build_collator(self, args: Namespace) -> SampleCollator:
        """Pads to ``--seq-length``."""
        config, family = self._config(args), load_family(self.family)
        vocab_size = int(str(family.arguments(config)["vocab_size"]))
        collator = sample_collator(
            family, config, seq_length=args.seq_length, vocab_size=vocab_size
        )
        if "quantile_balancing" in args.moe_router_load_balancing_type:
            return replace(collator, marks_padding=False)  # Megatron's takes no padding
        return collator

    def finish(self, run: FinishedRun) -> dict[str, Any]:
        """Answer the task's held-out questions by generation."""
        assert self.task is not None
        chat, questions = self._chat(run.arguments), self.task.valid()
        tokenizer = chat.processor.tokenizer
        answers = run.generate(
            [chat.sample(question) for question in questions],
            self.task.answer_tokens,
            tokenizer.eos_token_id,
        )
        said = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        right = [
            text.strip() == question.turns[-1].content[0].value
            for text, question in zip(said, questions, strict=True)
        ]
        return {
            "answers_right": sum(right) / len(right),
            "test_samples": len(right),
            "train_seconds": round(run.train_seconds, 2),
            "samples_per_second": round(run.samples_per_second, 1),
        }

    def save_assets(self, args: Namespace, save: Path) -> None:
        """Put configuration, processor, generation and media settings into ``save``/hf."""
        target, config = save / ASSETS, self._config(args)
        refuse_other_model(args, load_family(self.family).arguments(config))
        if target.is_dir() and (save / TRACKER).is_file():
            keep_media_settings(target, video_fps=args.video_fps)
            hash_assets(target, MEDIA_FILE)
            return
        fresh = save / f"{ASSETS}.new"
        shutil.rmtree(fresh, ignore_errors=True)
        loaded = loaded_assets(args)
        if loaded is not None and loaded != target:
            shutil.copytree(loaded, fresh)
        else:
            write_assets(fresh, config, self._chat(args).processor, args.hf)
        keep_media_settings(fresh, video_fps=args.video_fps)
        if args.checkpoint_hashes:
            is_hashed = (
                fresh / ASSET_HASHES
            ).is_file()  # came along, with what it says of the rest
            hash_assets(fresh, *([MEDIA_FILE] if is_hashed else []))
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)

    def _config(self, args: Namespace) -> Any:
        folders = asset_folders(args, CONFIG)
        key = f"config {folders[:1]}"
        if key not in self._known:
            config = read_hf_config(folders[0]) if folders else self.config()
            found = family_of(config).name
            if found != self.family:
                raise ConfigError(
                    f"recipe {self.name!r} is of model family '{self.family}', and {folders[0]} "
                    f"holds one of '{found}'; choose a recipe of that family"
                )
            self._known[key] = config
        return self._known[key]

    def _chat(self, args: Namespace) -> Chat:
        folders, config = asset_folders(args, PROCESSOR), self._config(args)
        key = f"processor {folders[:1]}"
        if key not in self._known:
            if folders:
                self._known[key] = read_processor(folders[0])
            else:
                assert self.processor is not None, "describe has refused"
                self._known[key] = self.processor(config)
        return Chat(
            family=load_family(self.family),
            config=config,
            processor=self._known[key],
            video_fps=args.video_fps,
            end_tokens=end_tokens(folders[0]) if folders else (),
            limits=media_limits(args),
        )

    def _for_training(self, args: Namespace, count: int) -> SampleSources | ChatDataset | None:
        mixture = training_mixture(args)
        if mixture is not None:
            reader = self._reader(args)
            return SampleSources(
                mixture=mixture,
                read=reader,
                measure=SampleMeasurer(reader=reader, by_reading=args.measure_by_reading),
                policy=reader.policy,
                costs=cost_model(args, self._config(args)),
                look_ahead=args.pack_look_ahead,
            )
        if self.task is None:
            return None
        return _of_task(args, self._chat(args), self.task.train(), count=count, seed=args.seed)

    def _for_validation(self, args: Namespace) -> RecordDataset | ChatDataset | None:
        if args.valid_data_path:
            folder = index_folder(args)
            files = [open_file(path, folder) for path in files_of(args.valid_data_path)]
            return RecordDataset(files, self._reader(args))
        return None if self.task is None else _of_task(args, self._chat(args), self.task.valid())

    def _reader(self, args: Namespace) -> SampleReader:
        chat = self._chat(args)
        return SampleReader(
            chat=chat,
            seq_length=args.seq_length,
            options=reading_options(args, chat),
            policy=bad_sample_policy(args),
        )


def _of_task(args: Namespace, chat: Chat, conversations: Any, **order: Any) -> ChatDataset:
    on_too_long = bad_sample_policy(args).on_too_long
    if on_too_long not in ("stop", "skip"):
        raise ConfigError(
            f"--on-too-long {on_too_long} with the recipe's own samples, which are not cut; give "
            "stop or skip, or data of yours (--data-path, --valid-data-path)"
        )
    return ChatDataset(
        conversations, chat=chat, seq_length=args.seq_length, on_too_long=on_too_long, **order
    )


def _require(run: _Run, given: Namespace) -> None:
    """Refuses a run without data or processor."""
    if run.task is None and not (given.data_path or given.train_data_path or given.data_mixture):
        raise ConfigError(
            f"recipe {run.name!r} trains on conversations of yours: give --data-path "
            "train.jsonl (docs/data.md says what stands in it)"
        )
    if run.processor is None and not asset_folders(given, PROCESSOR):
        for flag, root in (
            ("load", given.load),
            ("pretrained-checkpoint", given.pretrained_checkpoint),
        ):
            if root is not None and not holds_checkpoint(Path(root)):
                raise ConfigError(f"--{flag} {no_checkpoint(Path(root))}")
        raise ConfigError(
            f"recipe {run.name!r} needs the model's processor: give --load with an imported "
            "checkpoint (python -m megatron.mimo.convert import), or --hf with a folder that "
            "has processor_config.json or preprocessor_config.json, and the tokenizer's files"
        )
