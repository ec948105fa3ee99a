"""Export byte for byte, and training that goes on from a checkpoint; on ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.distributed.convert.models import same_files
from tests.distributed.models import ranks as model_ranks
from tests.distributed.models.expected import STEPS, Expected
from tests.distributed.models.ranks import Layout

__all__ = ["there_and_back", "train_with_a_stop"]


def there_and_back(name: str, change: Callable[[Any], None], folder: Path) -> list[str]:
    """What is not as it was after import and export, and what ``verify`` finds; [] for nothing."""
    from megatron.mimo.convert.exporting import export_model
    from megatron.mimo.convert.importing import import_model
    from megatron.mimo.convert.verify import verify_checkpoint
    from megatron.mimo.models import load_family

    family = load_family(name)
    config: Any = family.tiny()
    change(config)
    torch.manual_seed(5)
    model: Any = family.reference(config)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder / "hf", max_shard_size=size // 3)
    import_model(folder / "hf", folder / "mimo", shown=False)
    export_model(folder / "mimo", folder / "back", shown=False)
    findings = verify_checkpoint(folder / "hf", folder / "mimo", weights_only=True)
    wrong = [str(one) for one in findings if not one.equal]
    return wrong if same_files(folder / "hf", folder / "back") else ["files differ", *wrong]


def train_with_a_stop(name: str, layout: Layout, expected: Expected, folder: Path) -> list[float]:
    """Losses of ``STEPS`` steps; after half of them all is saved, built anew and loaded."""
    from megatron.core import dist_checkpointing, parallel_state

    losses: list[float] = []
    for half in range(2):
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        trainer = model_ranks.Trainer(name, layout, expected)
        if half:
            state = dist_checkpointing.load(_state(trainer, loading=True), str(folder))
            trainer.model.load_state_dict(state["model"])
            trainer.optimizer.load_state_dict(state["optimizer"])
        losses += [trainer.step() for _ in range(STEPS // 2)]
        if not half:
            if torch.distributed.get_rank() == 0:
                folder.mkdir()
            torch.distributed.barrier()
            dist_checkpointing.save(_state(trainer, loading=False), str(folder))
    return losses


def _state(trainer: Any, *, loading: bool) -> dict[str, Any]:
    model = trainer.model.sharded_state_dict()
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=loading)
    return {"model": model, "optimizer": optimizer}
