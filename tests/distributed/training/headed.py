"""The tiny recipe with a further head, whose loss counts at other positions than the text's."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.models.mimo import MimoModelConfig
from megatron.core.models.mimo.config import HeadSpec
from megatron.core.models.mimo.model.language.heads import HeadInputs
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.data import Sample
from megatron.mimo.models.common.place import Places
from megatron.mimo.recipes.recipe import Batch, Recipe
from tests.distributed.training.tiny import IMAGE, PAD, tiny


class Counter(nn.Module):
    """How many images there were so far, by a linear function of the hidden states."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.constant_(self.linear.weight, 0.1)  # on ranks of any layout the same
        nn.init.zeros_(self.linear.bias)

    def forward(self, inputs: HeadInputs) -> Tensor:
        counted_BS = self.linear(inputs.hidden_SBH).squeeze(-1).transpose(0, 1)
        return (counted_BS - inputs.targets["number"]).square()


def headed() -> Recipe:
    recipe = tiny()

    def build_model(args: Namespace, places: Places) -> MimoModelConfig:
        config = recipe.build_model(args, places)
        head = ModuleSpec(module=Counter, params={"hidden_size": args.hidden_size})
        return replace(config, heads={"counter": HeadSpec(module=head, weight=0.5)})

    def build_collator(args: Namespace) -> Callable[[Sequence[Sample]], Batch]:
        return _Collator(recipe.build_collator(args))

    return replace(recipe, name="headed", build_model=build_model, build_collator=build_collator)


class _Collator:
    def __init__(self, collate: Any) -> None:
        self._collate = collate

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        batch = self._collate(samples)
        ids_BS = batch["input_ids"]
        number_BS = (ids_BS == IMAGE).cumsum(dim=1).float()
        # Behind the first image of each sample, which is not where the text's loss counts.
        mask_BS = ((ids_BS != PAD) & (number_BS > 0)).to(torch.float32)
        return {**batch, "head_targets": {"counter": {"number": number_BS, "mask": mask_BS}}}
