"""Language models that cannot read rows as they are: refused once they are built."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron.core.models.mimo.errors import UnsupportedError
from megatron.core.models.mimo.model.merging.level_route import LevelRoute, untaken_levels
from megatron.core.models.mimo.partition.utils import PartitionAdapter
from megatron.core.models.mimo.signatures import names_argument
from megatron.core.models.mimo.submodules.encoder_output import levels_of
from megatron.core.utils import unwrap_model


def refuse_language_model(
    language_model: Any,
    submodules: nn.ModuleDict,
    route: LevelRoute,
    adapter: PartitionAdapter | None,
) -> None:
    """Refuse what only a language model that has been built shows not to work.

    Args:
        language_model: this rank's part of the language model.
        submodules: modality -> ``ModalitySubmodules``, those of this rank.
        route: route of levels through this part.
        adapter: cuts its sequences.

    Raises:
        UnsupportedError: an embedding that scatters by itself; levels that have no place.
    """
    refuse_scattering_embedding(language_model, adapter)
    refuse_untaken_levels(submodules, language_model, route)


def refuse_untaken_levels(
    submodules: nn.ModuleDict, language_model: Any, route: LevelRoute
) -> None:
    """Raise ``UnsupportedError`` for levels of rows that the language model has no place for.

    Args:
        submodules: modality -> ``ModalitySubmodules``, those of this rank.
        language_model: this rank's part; it takes levels where its ``forward`` names an argument
            ``level_rows``, and needs a decoder layer for each.
        route: route of levels to later stages; it knows those that have ``level_projections``.
    """
    for modality, submodule in submodules.items():
        levels = levels_of(submodule)
        if not levels:
            continue
        if not names_argument(language_model.forward, "level_rows"):
            raise untaken_levels([modality], levels, type(language_model).__name__)
        decoder = getattr(language_model, "decoder", None)
        layers = len(getattr(decoder, "layers", range(levels)))
        if layers < levels and levels != route.levels.get(modality):
            raise UnsupportedError(
                f"the encoders of {modality!r} give {levels} levels of their rows for the first "
                f"{levels} decoder layers, and this pipeline stage, the first, holds {layers}; "
                "give the modality level_projections, by which later stages know of its levels, or "
                "this stage more layers (decoder_first_pipeline_num_layers)"
            )


def refuse_scattering_embedding(language_model: Any, adapter: PartitionAdapter | None) -> None:
    """Raise ``UnsupportedError`` where the embedding would cut text before rows are merged."""
    embedding = getattr(unwrap_model(language_model), "embedding", None)
    scatters = getattr(embedding, "scatter_to_sequence_parallel", False)
    if adapter is not None and adapter.cfg.seq_parallel and scatters:
        raise UnsupportedError(
            "sequence parallelism requires the language model's embedding scatter to be "
            "disabled, because rows are merged first; pass "
            "scatter_embedding_sequence_parallel=False in language_model_spec.params"
        )
