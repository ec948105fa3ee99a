"""Where the modules of a model live: their process groups, sizes and stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

__all__ = ["Place", "Places"]


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
    """

    groups: ProcessGroupCollection
    is_first_stage: bool = True
    is_last_stage: bool = True
    chunk: int | None = None

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
