"""What low-rank adapters are added to a model, as one value."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.checkpoints.folders import saved_arguments

__all__ = ["TARGETS", "LoraSettings", "frozen_parts", "saved_settings", "settings_from"]

OF_DELTA_NETS = ("in_proj", "out_proj")
# Every linear layer of a Megatron transformer layer, with attention or a gated delta net.
TARGETS = ("linear_qkv", "linear_proj", *OF_DELTA_NETS, "linear_fc1", "linear_fc2")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters: ``y = W x + alpha / rank * up (down x)``, with W not trained.

    Attributes:
        modules: parts of the model whose linear layers get adapters, named as for freezing
            ("language", "images.encoders").
        rank: inner width of an adapter.
        alpha: scale of an adapter's output, times ``rank``.
        dropout: of an adapter's input, in training.
        targets: names of the linear layers, as attributes of their parent. By default all; then
            a model need not have each of them.

    Raises:
        ConfigError: nothing to adapt, or a number out of range.
    """

    modules: tuple[str, ...]
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if not self.modules or not self.targets:
            raise ConfigError(
                f"LoRA on modules {list(self.modules)}, layers {list(self.targets)}: expected at "
                "least one of each, such as --lora language"
            )
        if self.rank < 1:
            raise ConfigError(f"--lora-rank {self.rank}: must be at least 1")
        if not self.alpha > 0:
            raise ConfigError(f"--lora-alpha {self.alpha}: must be larger than 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--lora-dropout {self.dropout}: must be at least 0 and below 1")

    @property
    def are_targets_chosen(self) -> bool:
        """Somebody has asked for these layers by name."""
        return self.targets != TARGETS

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.alpha / self.rank


def settings_from(args: Namespace) -> LoraSettings | None:
    """The settings of ``--lora ...``; None for a run without adapters, or without the flags."""
    if not getattr(args, "lora", None):
        return None
    return LoraSettings(
        modules=tuple(args.lora),
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        targets=tuple(args.lora_targets),
    )


def saved_settings(checkpoint: Path) -> LoraSettings | None:
    """The settings of the run that wrote a checkpoint; None where it has no adapters.

    Args:
        checkpoint: one iteration's directory (``iter_0000100``).
    """
    args = saved_arguments(checkpoint)
    return None if args is None else settings_from(args)


def frozen_parts(checkpoint: Path) -> list[str]:
    """The parts that the run which wrote a checkpoint did not train (``--freeze``)."""
    return list(getattr(saved_arguments(checkpoint), "freeze", None) or [])
