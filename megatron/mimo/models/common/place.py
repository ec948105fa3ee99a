"""Where the modules of a model live: their process groups, sizes and stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["Place", "Places", "config_at"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one module of the model lives and how it is cut.

    Attributes:
        groups: the process groups of its layout.
        is_first_stage: this rank builds its first pipeline stage: of the language model, the
            embedding.
        is_last_stage: this rank builds its last pipeline stage: of the language model, the output
            layer and the loss.
        chunk: index of the virtual pipeline chunk; None without interleaving.
        encoder_stages: pipeline stages into which an encoder here is cut; it is whole where it
            shares the language model's place.
    """

    groups: ProcessGroupCollection
    is_first_stage: bool = True
    is_last_stage: bool = True
    chunk: int | None = None
    encoder_stages: int = 1

    @property
    def tp_size(self) -> int:
        """Tensor-parallel size."""
        return int(self.groups.tp.size())

    @property
    def cp_size(self) -> int:
        """Context-parallel size."""
        return int(self.groups.cp.size())

    @property
    def pp_size(self) -> int:
        """Number of pipeline stages."""
        return int(self.groups.pp.size())

    @property
    def dp_size(self) -> int:
        """Data-parallel size, context parallelism left out."""
        return int(self.groups.dp.size())


@dataclass(frozen=True, kw_only=True)
class Places:
    """The place of every module of a model; ``places["images"]``.

    Attributes:
        language: the language model's.
        modalities: those of modalities that have one of their own; the others live where the
            language model does (the uniform layout).
    """

    language: Place
    modalities: Mapping[str, Place] = field(default_factory=dict)

    def __getitem__(self, module: str) -> Place:
        """The place of a modality, or of "language"."""
        return self.modalities.get(module, self.language)


def config_at(language: TransformerConfig, place: Place) -> TransformerConfig:
    """The language model's configuration with the parallel sizes of another place.

    Returns ``language`` itself where the place has the same sizes, as in the uniform layout.
    """
    sizes = {
        "tensor_model_parallel_size": place.tp_size,
        "context_parallel_size": place.cp_size,
        "pipeline_model_parallel_size": place.pp_size,
    }
    if all(getattr(language, name) == size for name, size in sizes.items()):
        return language
    return replace(
        language,
        **sizes,
        virtual_pipeline_model_parallel_size=None,
        pipeline_model_parallel_layout=None,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        tensor_parallel_num_weight_shards=None,
        expert_tensor_parallel_num_weight_shards=None,
        sequence_parallel=language.sequence_parallel and place.tp_size > 1,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=None,
    )
