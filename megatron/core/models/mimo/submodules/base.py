"""One modality: encoders -> combine -> project. Legend: N rows of the modality, H features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.models.mimo.submodules.state import Offsets, descended_state
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

_PARTS = ("encoders", "decoders", "input_projections", "output_projections")
_LAYOUTS = ("bsh", "sbh")

# (name, encoder, what gives its rows [n, H] for arguments, arguments) -> rows [N, H]
EncoderCall = Callable[
    [str, nn.Module, Callable[[Mapping[str, Any]], torch.Tensor], Mapping[str, Any]], torch.Tensor
]


class ModalitySubmodules(nn.Module):
    """The encoders of one modality and the projection into the language model's width.

    An encoder is any module. It is called with the keyword arguments of its entry in
    ``encoder_inputs`` and returns rows [N, H], or [B, S, H], or a tuple that starts with one of
    these. One that returns [S, B, H] says so with an attribute ``output_layout = "sbh"``
    (a ``TransformerBlock`` is known to): the shape alone cannot tell, and a wrong guess would mix
    samples. One that has a method ``blank_inputs()`` gives the arguments of the smallest call
    that it takes: a micro-batch without this modality then runs it all the same, so that
    overlapped data-parallel collectives come in the same order on every rank, however the
    encoder is built. One that has a method ``rows_per_item(**inputs)`` gives, for the arguments
    of a call and as host integers, the rows of each item (image, clip): it says that every tensor
    or list among them holds items along dimension 0, and that an item's rows do not depend on
    other items. Ranks that have the same items may then encode some each and exchange the rows.

    Args:
        encoders, decoders: name -> module.
        input_projections, output_projections: at most one module each.
        is_first_stage, is_last_stage: this rank's pipeline stage within the modality.
        pg_collection: the modality's process groups; None for Megatron's global ones.

    Attributes:
        encoder_calls: encoder name -> what runs it in place of a plain call.

    Raises:
        ConfigError: (a ``ValueError``) several projections, arguments that are not known.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module] | None = None,
        decoders: Mapping[str, nn.Module] | None = None,
        input_projections: Iterable[nn.Module] | None = None,
        output_projections: Iterable[nn.Module] | None = None,
        is_first_stage: bool = True,
        is_last_stage: bool = True,
        pg_collection: Any = None,
        recompute_projections: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if kwargs:
            raise ConfigError(
                f"{type(self).__name__} got unknown arguments {sorted(kwargs)}; a subclass that "
                "takes more keeps them in its own __init__"
            )
        self.encoders = nn.ModuleDict(encoders or {})
        self.decoders = nn.ModuleDict(decoders or {})
        self.input_projections = nn.ModuleList(input_projections or [])
        self.output_projections = nn.ModuleList(output_projections or [])
        for part in ("input_projections", "output_projections"):
            count = len(getattr(self, part))
            if count > 1:
                raise ConfigError(
                    f"{type(self).__name__} got {count} {part}; rows go through one, so chain "
                    "them in a torch.nn.Sequential"
                )
        self.pg_collection = pg_collection
        self.recompute_projections = recompute_projections
        self._is_first_stage = is_first_stage
        self._is_last_stage = is_last_stage
        self.encoder_calls: dict[str, EncoderCall] = {}

    @classmethod
    def from_spec(
        cls, module_spec: ModuleSpec, is_first_stage: bool = True, is_last_stage: bool = True
    ) -> ModalitySubmodules:
        """Build from a spec whose ``submodules`` hold specs under the four part names.

        Input projections are built on the last stage, output projections on the first; the
        spec's ``params`` go to the constructor.
        """
        specs = module_spec.submodules or {}
        unknown = sorted(set(specs) - set(_PARTS))
        if unknown:
            raise ConfigError(
                f"the spec of {cls.__name__} has submodules {unknown}; expected {list(_PARTS)}"
            )
        wanted = {
            "encoders": True,
            "decoders": True,
            "input_projections": is_last_stage,
            "output_projections": is_first_stage,
        }
        parts = {name: _build_part(specs.get(name)) for name in _PARTS if wanted[name]}
        return cls(
            **parts,
            is_first_stage=is_first_stage,
            is_last_stage=is_last_stage,
            **(module_spec.params or {}),
        )

    @property
    def is_first_stage(self) -> bool:
        """True where this rank holds the modality's first stage."""
        return self._is_first_stage

    @property
    def is_last_stage(self) -> bool:
        """True where this rank holds the modality's last stage."""
        return self._is_last_stage

    def encode(self, encoders_data_batch: Mapping[str, Mapping[str, Any]]) -> list[torch.Tensor]:
        """Run every encoder on its inputs: a list of rows [N, H], in the order of ``encoders``.

        Raises:
            InputError: inputs for an encoder that does not exist, none for one that does, or an
                encoder output that is not rows.
        """
        if not encoders_data_batch:
            return []
        unknown = sorted(set(encoders_data_batch) - set(self.encoders))
        if unknown:
            raise InputError(
                f"inputs were given for encoders {unknown}, which do not exist; this modality "
                f"has {sorted(self.encoders)}"
            )
        rows = []
        for name, encoder in self.encoders.items():
            if name not in encoders_data_batch:
                raise InputError(
                    f"No inputs found for encoder '{name}'; got inputs for "
                    f"{sorted(encoders_data_batch)}"
                )
            encode = partial(_encode, name, encoder)
            inputs, call = encoders_data_batch[name], self.encoder_calls.get(name)
            rows.append(encode(inputs) if call is None else call(name, encoder, encode, inputs))
        return rows

    def combine_embeddings(self, embeddings: list[torch.Tensor]) -> torch.Tensor:
        """Concatenate the encoders' rows: [N_1, H], [N_2, H] ... -> [N_1 + N_2 + ..., H]."""
        if not embeddings:
            raise InputError("Cannot combine empty list of embeddings; give at least one tensor")
        if len(embeddings) == 1:
            return embeddings[0]
        widths = [rows_NH.size(-1) for rows_NH in embeddings]
        if len(set(widths)) > 1:
            raise InputError(
                f"the encoders gave rows of widths {widths}, which cannot be concatenated; "
                "override combine_embeddings or give each encoder its own projection"
            )
        return torch.cat(embeddings, dim=0)

    def project_embeddings(
        self, embeddings: list[torch.Tensor], is_input: bool = True
    ) -> torch.Tensor:
        """Combine and project: [N, H_encoder] -> [N, H]; unchanged without a projection.

        Args:
            embeddings: as ``combine_embeddings`` takes them.
            is_input: use the input projection, else the output projection.
        """
        combined_NH = self.combine_embeddings(embeddings)
        projections = self.input_projections if is_input else self.output_projections
        for projection in projections:
            projected = projection(combined_NH)
            if isinstance(projected, tuple):  # Megatron's linear layers: output and bias
                output_NH, bias_H = projected[0], projected[1]
                projected = output_NH if bias_H is None else output_NH + bias_H
            combined_NH = projected
        return combined_NH

    def decode(self, embeddings: torch.Tensor, data_batch: Mapping[str, Any]) -> torch.Tensor:
        """Turn rows [N, H] back into the modality's data; for subclasses that generate it."""
        raise NotImplementedError(
            f"{type(self).__name__} has no decode; subclass it to generate this modality"
        )

    def forward(
        self,
        encoder_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Rows [N, H] of this modality, None where there is nothing to encode.

        Args:
            encoder_inputs: encoder name -> keyword arguments of its call; read on the first
                stage only.
            hidden_states: [N, H_encoder] features that were encoded already.
        """
        if encoder_inputs is not None and hidden_states is not None:
            raise InputError("encoder_inputs and hidden_states are mutually exclusive; give one")
        if hidden_states is not None:
            combined_NH = hidden_states
        elif self.is_first_stage and encoder_inputs:
            combined_NH = self.combine_embeddings(self.encode(encoder_inputs))
        else:
            return None
        if not self.is_last_stage:
            return combined_NH
        if self.recompute_projections and torch.is_grad_enabled():
            rows_NH: torch.Tensor = checkpoint(
                self.project_embeddings, [combined_NH], use_reentrant=False
            )
            return rows_NH
        return self.project_embeddings([combined_NH])

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Offsets = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Sharded state of everything in this module, what a subclass added included."""
        tp_group = None
        if self.pg_collection is not None:
            metadata = {**(metadata or {}), "dp_cp_group": self.pg_collection.dp_cp}
            tp_group = self.pg_collection.tp
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return descended_state(self, prefix, sharded_offsets, metadata, tp_group=tp_group)


def _build_part(specs: Any) -> Any:
    if isinstance(specs, Mapping):
        return {name: build_module(spec) for name, spec in specs.items()}
    return [build_module(spec) for spec in specs or []]


def _encode(name: str, encoder: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    return _as_rows(name, encoder, encoder(**inputs))


def _as_rows(name: str, encoder: nn.Module, output: Any) -> torch.Tensor:
    if isinstance(output, tuple) and output:
        output = output[0]
    if not torch.is_tensor(output) or output.dim() not in (2, 3):
        got = tuple(output.shape) if torch.is_tensor(output) else type(output).__name__
        raise InputError(
            f"Encoder '{name}' output {got} is not supported; expected a tensor [rows, hidden] "
            "or [batch, sequence, hidden], or a tuple that starts with one"
        )
    if output.dim() == 2:
        return output
    default = "sbh" if isinstance(encoder, TransformerBlock) else "bsh"
    layout = getattr(encoder, "output_layout", default)
    if layout not in _LAYOUTS:
        raise ConfigError(
            f"Encoder '{name}' has output_layout {layout!r}; expected one of {list(_LAYOUTS)}"
        )
    if layout == "sbh":
        output = output.transpose(0, 1)
    rows_NH: torch.Tensor = output.reshape(-1, output.size(-1))
    return rows_NH
