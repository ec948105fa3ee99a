"""Wraps an encoder of transformers, unchanged, for encoders that have no Megatron form here.

The encoder is replicated over tensor-parallel ranks, which share its work: each encodes some of the
items (``encoder_split``). Compared with an encoder of Megatron's parts it costs memory: every rank
holds all of its weights.

Shape legend: N items, S positions of an item, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron.core.models.mimo.errors import (
    ConfigError,
    InputError,
    MimoError,
    UnsupportedError,
)
from megatron.mimo.backend.packages import require_hugging_face

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["HuggingFaceEncoder"]

Feature = str | int | Callable[[Any], Tensor]


class HuggingFaceEncoder(nn.Module):
    """A model of transformers, and which of its outputs are the rows.

    Parameters that the rows do not depend on (a pooling head, layers behind the feature layer) are
    kept, so that checkpoints stay whole, but not trained: data parallelism would wait for their
    gradients.

    An encoder without a trained parameter, frozen here or by ``MimoModel.freeze``, stays in
    evaluation mode when the model is set to training.

    Args:
        source: a Hugging Face directory, whose weights every rank reads; or a configuration, for
            random weights, drawn from torch's default generator, which Megatron seeds equally on
            ranks that hold copies.
        blank: the arguments of a call with one item of nothing, such as
            ``{"pixel_values": torch.zeros(1, 3, 224, 224)}``. Tensors hold items along dimension
            0 and go to the model; anything else (host numbers) is for ``rows`` alone.
        model_class: of transformers; ``AutoModel`` finds it by default.
        part: path of the encoder within the model, such as "encoder" of a ``WhisperModel``.
        feature: the output that gives the rows: an attribute of what the model returns, such as
            "last_hidden_state" or "pooler_output"; or an index into its hidden states, 0 for the
            embedding; or a function of what the model returns. [N, S, H]; [N, H] is one row per
            item; a map [N, H, height, width] is read row by row.
        drop_first: positions that are left out at the start of every item: class token, registers.
        rows: how many rows each item gives, for the arguments of a call and as host integers; rows
            behind them are left out. By default all, which are as many for every item.
        frozen: not trained.
        dtype: of the parameters, until the whole model is converted.

    Raises:
        ConfigError: the directory cannot be read or lacks weights; the feature is not there.
        UnsupportedError: a trained encoder whose norms mix the items of a batch.
    """

    def __init__(
        self,
        source: PreTrainedConfig | str | Path,
        *,
        blank: Mapping[str, Any],
        model_class: Any = None,
        part: str = "",
        feature: Feature = "last_hidden_state",
        drop_first: int = 0,
        rows: Callable[..., Sequence[int]] | None = None,
        frozen: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.feature = feature
        self.drop_first = drop_first
        self._rows = rows
        self._blank = dict(blank)
        self._tensors = frozenset(name for name, value in blank.items() if torch.is_tensor(value))
        if not self._tensors or any(len(self._blank[name]) != 1 for name in self._tensors):
            shapes = {name: [*self._blank[name].shape] for name in self._tensors}
            raise ConfigError(
                f"blank has tensors of shapes {shapes}; expected at least one, and one item along "
                "dimension 0 of each"
            )
        if drop_first < 0:
            raise ConfigError(f"drop_first is {drop_first}; expected at least 0")
        self.model = _make_model(source, model_class, part, dtype)
        self.to(dtype)
        self.model.requires_grad_(not frozen)
        if not frozen:
            _refuse_batch_norm(self.model)
        self.rows_of_blank = self._try_out()

    def _try_out(self) -> int:
        """Rows of a blank item; parameters that it does not depend on are frozen."""
        self.model.eval()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with torch.set_grad_enabled(bool(trained)):
            rows_NH = self._rows_of_blank()
        if trained:
            total = rows_NH.float().square().sum()
            gradients = torch.autograd.grad(total, trained, allow_unused=True)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.requires_grad_(gradient is not None)
        if len(rows_NH) == 0:
            raise ConfigError(
                f"a blank item gives no rows with drop_first={self.drop_first}; expected at least "
                "one: lower it, or give a larger blank item"
            )
        self.train(self.training)
        return len(rows_NH)

    def _rows_of_blank(self) -> Tensor:
        try:
            rows_NH: Tensor = self(**self.blank_inputs())
        except MimoError:
            raise
        except Exception as error:  # models raise nearly every kind
            shapes = {name: [*self._blank[name].shape] for name in sorted(self._tensors)}
            takes = [*inspect.signature(self.model.forward).parameters]
            raise ConfigError(
                f"{type(self.model).__name__} refuses the blank item, tensors of shapes {shapes}: "
                f"{type(error).__name__}: {error}; name and size them as its forward takes them, "
                f"{takes}"
            ) from error
        return rows_NH

    def train(self, mode: bool = True) -> HuggingFaceEncoder:
        """Set the mode; without trained parameters, it is evaluation."""
        trained = any(parameter.requires_grad for parameter in self.parameters())
        super().train(mode and trained)
        return self

    def blank_inputs(self) -> dict[str, Any]:
        """Arguments of ``forward`` for one blank item, for micro-batches without this modality."""
        device = next(self.parameters()).device
        return {
            name: value.to(device) if torch.is_tensor(value) else value
            for name, value in self._blank.items()
        }

    def rows_per_item(self, **inputs: Any) -> list[int]:
        """Rows of each item."""
        if self._rows is not None:
            return list(self._rows(**inputs))
        return [self.rows_of_blank] * self._count(inputs)

    def forward(self, **inputs: Any) -> Tensor:
        """Encode items.

        Args:
            inputs: named as ``blank``; floating-point tensors are converted to the encoder's dtype.

        Returns:
            [sum of ``rows_per_item``, H], item by item; N may be 0.

        Raises:
            InputError: other arguments, or items that give too few rows.
        """
        if inputs.keys() != self._blank.keys():
            raise InputError(
                f"the encoder got {sorted(inputs)}; expected {sorted(self._blank)}, as its blank "
                "item has them"
            )
        if self._count(inputs) == 0:
            # The rows of a blank item, which are dropped, give every parameter a gradient of zero
            # instead of none: this rank takes part in the reductions that others enter.
            return self.forward(**self.blank_inputs())[:0]
        dtype = next(self.parameters()).dtype
        tensors = {
            name: inputs[name].to(dtype) if inputs[name].is_floating_point() else inputs[name]
            for name in self._tensors
        }
        if isinstance(self.feature, int):
            tensors["output_hidden_states"] = True
        features_NSH = _as_positions(self._select(self.model(**tensors, return_dict=True)))
        features_NSH = features_NSH[:, self.drop_first :]
        if self._rows is None:
            return features_NSH.flatten(0, 1)
        counts = self.rows_per_item(**inputs)
        if len(counts) != len(features_NSH) or max(counts) > features_NSH.size(1):
            raise InputError(
                f"rows gives {counts} for {len(features_NSH)} items of {features_NSH.size(1)} "
                "positions; expected one number for each, no larger than that"
            )
        kept = [item_SH[:count] for item_SH, count in zip(features_NSH, counts, strict=True)]
        return torch.cat(kept)

    def _count(self, inputs: Mapping[str, Any]) -> int:
        return len(inputs[next(iter(self._tensors))])

    def _select(self, output: Any) -> Tensor:
        if callable(self.feature):
            return self.feature(output)
        if isinstance(self.feature, str):
            found = getattr(output, self.feature, None)
            where = f"outputs {sorted(output.keys())}"
        else:
            states = output.get("hidden_states") or ()
            within = -len(states) <= self.feature < len(states)
            found = states[self.feature] if within else None
            where = f"{len(states)} hidden states"
        if found is None:
            raise ConfigError(
                f"feature {self.feature!r} of {type(self.model).__name__} is not there; it has "
                f"{where}"
            )
        selected: Tensor = found
        return selected

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Convert parameters, but keep the precision of what is computed and never saved.

        Rotary frequencies in bf16 would turn positions by wrong angles.
        """
        computed = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if name in module._non_persistent_buffers_set
            and buffer is not None
            and buffer.is_floating_point()
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in computed:
            converted = module._buffers[name]
            if converted is not None and converted.dtype != buffer.dtype and not buffer.is_meta:
                module._buffers[name] = buffer.to(converted.device)
        return self


def _make_model(source: Any, model_class: Any, part: str, dtype: torch.dtype) -> nn.Module:
    require_hugging_face("encoders of Hugging Face")
    from transformers import AutoConfig, AutoModel

    is_directory = isinstance(source, str | Path)
    if is_directory and not (Path(source) / "config.json").is_file():
        raise ConfigError(
            f"{source} has no config.json; expected a Hugging Face model's directory, or a "
            "configuration for random weights"
            if Path(source).is_dir()
            else f"{source}: there is no such folder; correct the path"
        )
    if is_directory and not torch.empty(0).is_meta:
        whole = _load(source, AutoModel if model_class is None else model_class, part, dtype)
    else:
        config = source
        if is_directory:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        whole = AutoModel.from_config(config) if model_class is None else model_class(config)
    try:
        return whole.get_submodule(part)
    except AttributeError as error:
        raise ConfigError(
            f"{type(whole).__name__} has no part {part!r}; expected the path of a module, such as "
            f"one of {[name for name, _ in whole.named_children()]}"
        ) from error


def _load(source: Any, maker: Any, part: str, dtype: torch.dtype) -> nn.Module:
    from safetensors import SafetensorError

    try:
        model, report = maker.from_pretrained(
            source,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{source} cannot be read: {error}") from error
    missing = sorted(key for key in report["missing_keys"] if key.startswith(part))
    if missing:
        raise ConfigError(
            f"{source} lacks {len(missing)} weights of {type(model).__name__}, such as "
            f"{missing[0]!r}, which would be random; expected a directory of that model: name the "
            "class that was saved as model_class, and the encoder within it as part"
        )
    loaded: nn.Module = model
    return loaded


def _refuse_batch_norm(model: nn.Module) -> None:
    """Refuse batch norms: items would depend on each other, and statistics differ between ranks."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UnsupportedError(
                f"{name} of {type(model).__name__} is a {type(module).__name__}, whose statistics "
                "depend on which items a rank has; use frozen=True, which keeps them"
            )


def _as_positions(features: Tensor) -> Tensor:
    """[N, S, H] of whatever layout a model gives."""
    if features.dim() == 2:
        return features[:, None]
    if features.dim() == 4:
        return features.flatten(2).transpose(1, 2)
    if features.dim() != 3:
        raise ConfigError(
            f"the feature has shape {[*features.shape]}; expected [N, S, H], [N, H] or "
            "[N, H, height, width]"
        )
    return features
