"""What the host does for each layer: ``python benchmarks/host_overhead.py [--json]``.

A GPU that computes faster than Python asks waits for Python. For packed rows of tiny models in fp32
on the CPU, this says of one layer, forward and backward:

- ``launches``: operations that would start a kernel on a GPU. Views and empty tensors are none. A
  layer's are the difference of two models that differ in the number of layers.
- ``host_us``: microseconds of a processor with eight documents of two tokens, or images of two
  patches: the host's own work, with next to no arithmetic. The least of many rounds of the model
  with more layers, where what begins a backward pass weighs little.
- ``calls``: of functions by Python in the same, which no other load of the machine changes.

What is one kernel on a GPU is one operation here: attention, RMSNorm and, where time is measured,
the fused operators of this project. On the CPU every document is a call of attention, and the
others are made of a dozen operations.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import gc
import importlib.util
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.core.packed_seq_params import PackedSeqParams

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "qwen2_audio")
LAYERS = (2, 6)
_SAMPLES, _SHORT = 8, 2  # documents, and their tokens where time is measured
_NO_KERNEL = frozenset(
    {
        *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"),
        *("aten::new_empty_strided", "aten::_unsafe_view", "aten::lift_fresh", "aten::detach"),
        *(
            "aten::promote_types",
            "aten::alias",
            "aten::split",
            "aten::split_with_sizes",
            "aten::unbind",
            "aten::chunk",
        ),
    }
)


class LaunchCounter(TorchDispatchMode):
    """Counts operations that start a kernel while it is active, backward included.

    Attributes:
        counts: operation name -> occurrences.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().split(".")[0]
        views = [one.alias_info for one in func._schema.returns]
        is_view = any(one is not None and not one.is_write for one in views)
        if not is_view and name not in _NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """One launch each way, in the place of attention."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return q.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        sizes = [one.numel() for one in ctx.saved_tensors]
        parts = grads[0].new_zeros(sum(sizes)).split(sizes)
        return tuple(
            part.view(one.shape) for part, one in zip(parts, ctx.saved_tensors, strict=True)
        )


class _Norm(torch.autograd.Function):
    """One launch each way, in the place of ``torch.nn.functional.rms_norm``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return hidden.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (weight,) = ctx.saved_tensors
        parts = grads[0].new_zeros(grads[0].numel() + weight.numel())
        ends = parts.split((grads[0].numel(), weight.numel()))
        return ends[0].view(grads[0].shape), ends[1].view(weight.shape)


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Attention and RMSNorm cost one launch each way."""
    from megatron.mimo.layers.attention import core_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
        return _Attention.apply(q, k, v)

    def norm(hidden: Tensor, _: Any, weight: Tensor, *__: Any) -> Any:
        return _Norm.apply(hidden, weight)

    yield from _standing_in(
        [
            (core_attention, "packed_attention", attend),
            (core_attention, "dense_attention", attend),
            (torch.nn.functional, "rms_norm", norm),
        ]
    )


@contextmanager
def operators_of_a_gpu() -> Iterator[None]:
    """The fused operators cost one operation each; before they were there, nothing changes."""
    if importlib.util.find_spec("megatron.mimo.layers.fused") is None:
        yield
        return
    from megatron.mimo.layers.fused import activation, rotation

    heads: list[tuple[Any, str, Any]] = []
    if hasattr(rotation, "turn_heads"):
        heads = [
            (rotation, "_heads", rotation._empty_heads),
            (rotation, "_heads_back", rotation._empty_heads_back),
        ]
    yield from _standing_in(
        [
            *heads,
            (rotation, "_rotate", lambda q, k, *_: (q.clone(), k.new_empty(k.shape))),
            (activation, "_forward", lambda x, _, gated: x[:, : x.size(1) // (1 + gated)].clone()),
            (activation, "_backward", lambda *given: given[1].clone()),
        ]
    )


def _standing_in(places: list[tuple[Any, str, Any]]) -> Iterator[None]:
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, stand_in in places:
        setattr(owner, name, stand_in)
    try:
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


class Step:
    """Forward and backward of a packed row of a tiny model.

    Args:
        name: of the family.
        language: layers of its language model.
        encoder: layers of its encoder.
    """

    def __init__(self, name: str, *, language: int, encoder: int) -> None:
        from megatron.mimo.arguments.standalone import build_model, model_settings
        from megatron.mimo.models import load_family

        family = load_family(name)
        config = _resized(family.tiny(), language=language, encoder=encoder)
        settings = model_settings(family, config)
        self.model: Any = build_model(family, config, settings, device=torch.device("cpu")).train()
        self.batch = _packed(family, config, settings.tokens)

    def run(self) -> None:
        """Once."""
        self.model.zero_grad(set_to_none=True)
        losses, mask = self.model(**self.batch)
        (losses * mask).sum().backward()

    def launches(self) -> Counter[str]:
        """By operation."""
        self.run()
        with LaunchCounter() as counter:
            self.run()
        return counter.counts

    def stacks(self) -> dict[str, Stack]:
        """The layers of the encoder and of the language model, as they are called."""
        from megatron.core.transformer.transformer_layer import TransformerLayer

        found: dict[str, Stack] = {}
        hooks = []
        for name, module in self.model.named_modules():
            if isinstance(module, TransformerLayer):
                part = "language" if name.startswith("language_model") else "encoder"
                found.setdefault(part, Stack()).layers.append(module)
                take = found[part].take
                hooks.append(module.register_forward_pre_hook(take, with_kwargs=True))
        self.run()
        for hook in hooks:
            hook.remove()
        return found


@dataclass
class Stack:
    """Layers, and what the first of them is called with."""

    layers: list[Any] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)

    def take(self, module: Any, _: Any, given: dict[str, Any]) -> None:
        """Keeps the arguments of the first layer, cut to a few tokens."""
        if module is not self.layers[0]:
            return
        whole, packed = given["hidden_states"], given.get("packed_seq_params")
        tokens = _SHORT if packed is None else _SHORT * _SAMPLES
        self.given = {name: _cut(value, len(whole), tokens) for name, value in given.items()}
        self.given |= {"context": None, "context_mask": None}  # levels have places in whole rows

    def run(self) -> float:
        """Forward and backward; the time of the processor between them."""
        out = self.given["hidden_states"].detach().requires_grad_()
        for layer in self.layers:
            out, _ = layer(**self.given | {"hidden_states": out})
        middle = time.process_time()
        out.backward(out.detach())
        return middle

    def seconds(self) -> tuple[float, float]:
        """Of a processor for one layer, forward and backward."""
        self._forget_gradients()
        start = time.process_time()
        middle = self.run()
        end = time.process_time()
        return (middle - start) / len(self.layers), (end - middle) / len(self.layers)

    def calls(self) -> float:
        """Of functions for one layer."""
        self._forget_gradients()
        with cProfile.Profile() as profile:
            self.run()
        return sum(entry.callcount for entry in profile.getstats()) / len(self.layers)

    def _forget_gradients(self) -> None:
        for layer in self.layers:
            layer.zero_grad(set_to_none=True)


def _cut(value: Any, whole: int, tokens: int) -> Any:
    """The first tokens of what has ``whole`` of them; documents of two tokens."""
    if isinstance(value, Tensor):
        return value.detach()[:tokens].clone() if len(value) == whole else value.detach()
    if not isinstance(value, PackedSeqParams):
        return value
    given = [one.name for one in fields(value) if one.init]
    kept = {name: _cut(getattr(value, name), whole, tokens) for name in given}
    borders = torch.arange(0, tokens + 1, _SHORT, dtype=torch.int32)
    for name in ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
        kept[name] = borders if kept[name] is not None else None
    return type(value)(**kept | {"max_seqlen_q": _SHORT, "max_seqlen_kv": _SHORT})


def _resized(config: Any, *, language: int, encoder: int) -> Any:
    """A configuration with other numbers of layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = language
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[0]] * language
    tower = getattr(config, "vision_config", None) or config.audio_config
    for depth in ("depth", "num_hidden_layers", "encoder_layers"):
        if depth in vars(tower):
            setattr(tower, depth, encoder)
    if getattr(tower, "deepstack_visual_indexes", None):
        tower.deepstack_visual_indexes = [0]
    return config


def _packed(family: Any, config: Any, tokens: int) -> dict[str, Any]:
    from megatron.mimo.data import PackingCollator

    generator = torch.Generator().manual_seed(3)
    samples = []
    while len(samples) < _SAMPLES:
        sample = family.sample(config, family.example(config, generator))
        if sample.media:
            samples.append(sample)
    media = family.media(config)
    collator = PackingCollator(
        seq_length=sum(len(sample.token_ids) for sample in samples),
        vocab_size=tokens,
        pad_id=0,
        special_token_ids=media.special_token_ids,
        media_formats=media.formats,
        span_modalities=media.spans,
        mrope=media.mrope,
    )
    batch: dict[str, Any] = collator(samples)
    return batch


def measure(names: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Launches and microseconds of a layer, by family and part."""
    from megatron.mimo.arguments.standalone import process_groups

    report: dict[str, Any] = {"torch": torch.__version__}
    with process_groups(), kernels_of_a_gpu():
        for name in names:
            few, many = LAYERS
            steps = {
                "few": Step(name, language=few, encoder=few),
                "encoder": Step(name, language=few, encoder=many),
                "language": Step(name, language=many, encoder=few),
            }
            counts = {part: step.launches() for part, step in steps.items()}
            stacks = {part: steps[part].stacks()[part] for part in ("encoder", "language")}
            report[name] = {
                f"{part} layer": {
                    "launches": (counts[part].total() - counts["few"].total()) / (many - few),
                    **_on_the_host(stacks[part], rounds),
                    "by_operation": _difference(counts[part], counts["few"], many - few),
                }
                for part in ("encoder", "language")
            }
    return report


def _on_the_host(stack: Stack, rounds: int) -> dict[str, float]:
    gc.collect()
    gc.disable()
    try:
        with operators_of_a_gpu():
            stack.run()
            ways = zip(*(stack.seconds() for _ in range(rounds)), strict=True)
            forward, backward = (1e6 * min(way) for way in ways)
            return {
                "host_us": round(forward + backward, 1),
                "forward_us": round(forward, 1),
                "calls": stack.calls(),
            }
    finally:
        gc.enable()


def _difference(many: Counter[str], few: Counter[str], layers: int) -> dict[str, float]:
    found = {name: (many[name] - few[name]) / layers for name in many}
    return {name: found[name] for name in sorted(found, key=lambda n: -found[n]) if found[name]}


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--rounds", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = measure(tuple(arguments.families), arguments.rounds)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for name in arguments.families:
        for part, row in report[name].items():
            print(
                f"{name:<14}{part:<16}{row['launches']:>8.1f} launches{row['host_us']:>10.1f} us"
                f" ({row['forward_us']:.1f} forward){row['calls']:>9.0f} calls"
            )


if __name__ == "__main__":
    main()
