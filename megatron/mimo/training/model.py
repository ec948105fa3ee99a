"""Builds this rank's part of a recipe's model, the way Megatron's ``pretrain`` asks for it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.lora import load_without_adapters
from megatron.mimo.models.common.place import Place, Places
from megatron.mimo.models.common.vocabulary import leave_out_padding
from megatron.mimo.process import presence
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.training.module_grids import ModuleGrids
from megatron.mimo.training.module_ranks import encodes_alone
from megatron.mimo.training.trained_parts import Trained, apply_parts, survey_parts

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel, MimoModelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection

__all__ = ["ModelBuilder"]


class ModelBuilder:
    """The ``model_provider`` of a run.

    Args:
        recipe: gives the model's description.
        args: of the run.
        say: tells a human.

    Attributes:
        chunks: what it has built, unwrapped.
        trained: what is trained of it, once all is built.
        grids: of its modules.
    """

    def __init__(
        self,
        recipe: Recipe,
        args: Namespace,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._recipe = recipe
        self._args = args
        self.grids = ModuleGrids(args)
        self._say = say
        self._adapters: list[str] = []
        self.chunks: list[MimoModel] = []
        self.trained: Trained | None = None

    def __call__(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> MimoModel:
        """Build one chunk; with the last, say how much is trained.

        Collective: every rank builds as many chunks.

        Raises:
            ConfigError: the recipe's model breaks the gradient contract, or a flag names a part
                that it does not have.
        """
        from megatron.core.models.mimo import MimoModel

        if config is not None:
            raise ConfigError("a ready transformer config is not supported: the recipe builds it")
        assert pg_collection is not None, "pretrain passes its process groups"
        places = self._places(pg_collection, pre_process, post_process, vp_stage)
        described = self._recipe.build_model(self._args, places)
        if self.grids:
            described = self.grids.described(described)
            if self.grids.apart and pre_process and not encodes_alone(self._args):
                _draw_encoders(described)
        model = MimoModel(described, cp_group=pg_collection.cp, tp_group=pg_collection.tp)
        if not model.config.calculate_per_token_loss:
            raise ConfigError(
                f"recipe {self._recipe.name!r} builds a model with calculate_per_token_loss=False; "
                "take it from the arguments (core_transformer_config_from_args does)"
            )
        model.pg_collection = pg_collection
        if self._args.pack and self._args.micro_batch_size > 1:
            # One row of several sequences: stages exchange other shapes than Megatron expects.
            model.config.variable_seq_lengths = True
        presence.here().slot.has(_part(model, pg_collection))
        if self.grids:
            self.grids.agree(model)
        if model.language_model is not None:
            leave_out_padding(
                model.language_model,
                tokens=_vocabulary(self._args),
                rows=self._args.padded_vocab_size,
                tp_group=pg_collection.tp,
            )
        self._adapters += apply_parts(model, self._args)
        if self._adapters and not self._args.loads_adapters:
            load_without_adapters(model)
        self.chunks.append(model)
        count = self._args.virtual_pipeline_model_parallel_size or 1
        if len(self.chunks) == (1 if encodes_alone(self._args) else count):
            self.trained = survey_parts(self.chunks, self._args, self._adapters)
            self._say(self.trained.text)
        return model

    def _places(
        self, groups: ProcessGroupCollection, first: bool, last: bool, chunk: int | None
    ) -> Places:
        """Where this rank's modules live."""
        interleaved = self._args.virtual_pipeline_model_parallel_size is not None
        if interleaved and encodes_alone(self._args):
            chunk = 0  # of a description whose language model is built elsewhere
        modalities = {}
        if self.grids:
            modalities = {
                name: Place(groups=own, encoder_stages=own.pp.size())
                for name, own in self.grids.grids.groups.items()
            }
        language = Place(groups=groups, is_first_stage=first, is_last_stage=last, chunk=chunk)
        return Places(language=language, modalities=modalities)


def _draw_encoders(described: MimoModelConfig) -> None:
    """Draw the weights of encoders that are on other ranks, and forget them.

    The language model's first stage is drawn behind its encoders in every other layout.
    """
    for spec in described.modality_submodules_spec.values():
        spec.module.from_spec(spec)


def _vocabulary(args: Namespace) -> int:
    """Tokens without padding, from where Megatron takes them to pad."""
    if args.tokenizer_type == "NullTokenizer":
        return int(args.vocab_size)
    from megatron.training.global_vars import get_tokenizer

    return int(get_tokenizer().vocab_size)


def _part(model: MimoModel, groups: ProcessGroupCollection) -> str:
    """What this rank has of the model, for messages; nothing where ranks have it all."""
    stages, parts = groups.pp.size(), [*model.modality_submodules]
    if model.language_model is not None:
        stage = f" stage {groups.pp.rank()}" if stages > 1 else ""
        parts.append(f"language{stage}")
    whole = stages == 1 and model.mimo_config.module_to_grid_map is None
    return "" if whole else " + ".join(parts)
