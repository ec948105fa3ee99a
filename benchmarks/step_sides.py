"""Both sides of the benchmark of a training step: a model of a family, ours and transformers'.

What a family brings is a ``Case``: its sizes, their configurations, conversations, and what of its
arithmetic is not the language model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Case", "Loss", "Size", "our_losses", "real_flops", "reference", "theirs"]

Loss = Callable[[], Tensor]
Conversations = list[dict[str, Tensor]]
_PER_TOKEN = ("input_ids", "mm_token_type_ids")


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and its conversations.

    Attributes:
        lengths: of the texts, in tokens; the rows of media come on top.
        dtype: of parameters and activations.
    """

    lengths: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured of a family.

    Attributes:
        family: its name.
        sizes: by name; "tiny" for a machine without a GPU, "2b" the default with one.
        configuration: of a size.
        conversations: of a configuration, one for each length, in the form of transformers.
        media_flops: operations of forward and backward that the media of conversations need.
    """

    family: str
    sizes: Mapping[str, Size]
    configuration: Callable[[str], Any]
    conversations: Callable[[Any, Sequence[int]], Conversations]
    media_flops: Callable[[Any, Conversations], float]

    def given(self, size: str) -> Conversations:
        """The conversations of a size."""
        return self.conversations(self.configuration(size), self.sizes[size].lengths)


def reference(case: Case, config: Any, device: Any, dtype: Any) -> Any:
    """The model of transformers, made on the device: the same weights in every process."""
    from megatron.mimo.models import load_family

    torch.manual_seed(1)
    with torch.device(device):
        model: Any = load_family(case.family).reference(config)
    return model.to(device, dtype).train()


def theirs(case: Case, size: str, model: Any, device: Any) -> Loss:
    """A function that gives transformers' loss of the padded conversations."""
    given, config = case.given(size), case.configuration(size)
    longest = max(one["input_ids"].size(1) for one in given)

    def rows(name: str) -> Tensor:
        """Padded with zeros, of one value per token."""
        padded = torch.zeros(len(given), longest, dtype=torch.long)
        for row, one in zip(padded, given, strict=True):
            row[: one[name].size(1)] = one[name][0]
        return padded

    lengths = torch.tensor([one["input_ids"].size(1) for one in given])
    mask = (torch.arange(longest)[None] < lengths[:, None]).long()
    arguments: dict[str, Tensor] = {"attention_mask": mask}
    for name, value in given[0].items():
        if name in _PER_TOKEN:
            arguments[name] = rows(name)
        else:
            joined = torch.cat([one[name] for one in given])
            is_float = value.is_floating_point()
            arguments[name] = joined.to(case.sizes[size].dtype) if is_float else joined
    ids, placeholders = arguments["input_ids"], torch.tensor(_placeholders(case, config))
    arguments["labels"] = ids.masked_fill(torch.isin(ids, placeholders) | (mask == 0), -100)
    arguments = {name: value.to(device) for name, value in arguments.items()}

    def loss() -> Tensor:
        value: Tensor = model(**arguments).loss
        return value

    return loss


def our_losses(case: Case, size: str, model: Any, device: Any) -> dict[str, Loss]:
    """Our losses of the conversations, packed and padded."""
    from megatron.mimo.data import PackingCollator, SampleCollator
    from megatron.mimo.models import load_family

    family, config = load_family(case.family), case.configuration(size)
    samples = [family.sample(config, one) for one in case.given(size)]
    lengths = [len(sample.token_ids) for sample in samples]
    media = family.media(config)
    settings: dict[str, Any] = {
        "vocab_size": config.get_text_config().vocab_size,
        "pad_id": 0,
        "special_token_ids": media.special_token_ids,
        "media_formats": media.formats,
        "mrope": media.mrope,
    }
    batches = {
        "padded": SampleCollator(seq_length=max(lengths), **settings)(samples),
        "packed": PackingCollator(seq_length=sum(lengths), **settings)(samples),
    }
    dtype = case.sizes[size].dtype
    return {name: _ours(model, batch, device, dtype) for name, batch in batches.items()}


def _ours(model: Any, batch: dict[str, Any], device: Any, dtype: Any) -> Loss:
    """A function that gives our loss of a collated micro-batch."""
    from megatron.mimo.data.micro_batches.batch import keep_for_stage
    from megatron.mimo.data.micro_batches.broadcast import move
    from megatron.mimo.training.forward_step import model_inputs

    batch = move(keep_for_stage(batch, pre_process=True, post_process=True, dtype=dtype), device)

    def loss() -> Tensor:
        losses_BS, mask_BS = model(**model_inputs(batch, labels=batch["labels"]))
        value: Tensor = (losses_BS.float() * mask_BS).sum() / mask_BS.sum()
        return value

    return loss


def _placeholders(case: Case, config: Any) -> list[int]:
    from megatron.mimo.models import load_family

    return list(load_family(case.family).media(config).special_token_ids.values())


def real_flops(case: Case, config: Any, given: Conversations) -> float:
    """Floating-point operations of forward and backward that real tokens need, padding none."""
    text = config.get_text_config()
    hidden, lengths = text.hidden_size, [one["input_ids"].size(1) for one in given]
    head = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    inner, shared = head * text.num_attention_heads, head * text.num_key_value_heads
    layer = hidden * (2 * inner + 2 * shared) + 3 * hidden * text.intermediate_size
    weights = text.num_hidden_layers * layer + hidden * text.vocab_size
    total = 6 * weights * sum(lengths)
    total += 6 * text.num_hidden_layers * inner * sum(length**2 for length in lengths)
    return float(total + case.media_flops(config, given))
