"""A training step beside transformers': ``python benchmarks/llava.py [--family qwen3_vl]``.

The same model, LLaVA's or another family's, from the same Hugging Face configuration with random
weights, is trained on the same conversations (one image each, texts of very different lengths) in
three ways:

- ``packed``: ours, the conversations side by side in rows without padding;
- ``padded``: ours, one conversation per row, padded to the longest;
- ``transformers``: theirs, padded in the same way, with ``attention_mask``.

A step is forward, backward and AdamW; with ``--micro-batches N``, N times forward and backward of
the same batch. Times are medians over rounds in which what is measured in one process takes turns.
``same_loss`` says how far the losses of the first step are apart, relatively: the same weights, the
same batch.

``--size tiny``, the default without a GPU, is measured in one process and says nothing about a GPU.
``--size 2b`` (bf16; of Qwen3-VL ``4b`` too) wants a GPU, where the model is made. There
transformers is measured in a process of its own, without Transformer Engine and with the fastest of
PyTorch's attentions.
``memory_gb`` is a step's peak with weights and optimizer state, ``busy_ms`` the time in which the
GPU works in forward and backward, ``step_over_busy`` a step by the time in which it works at all,
``host_waits`` how often the host waits for it in forward.
``tflops`` counts the arithmetic of real tokens only, and ``of_matmul`` is its share of the rate of
a product of two matrices.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import device as on_device
from benchmarks.step_cases import CASES
from benchmarks.step_sides import Case, Loss, our_losses, real_flops, reference, theirs

_WARM_UP = 2  # steps that are not timed
_SAME = 0.02  # losses of the first step that are further apart are of two models


class Repeats(NamedTuple):
    """How often: rounds of steps, and micro-batches of a step."""

    rounds: int
    micro_batches: int


def work(loss: Loss, optimizer: torch.optim.Optimizer, micro_batches: int) -> Tensor:
    """What a step does; its last loss."""
    for _ in range(micro_batches):
        value = loss()
        value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value.detach()


def step(loss: Loss, optimizer: torch.optim.Optimizer, device: Any, micro_batches: int = 1) -> Any:
    """One training step: its loss, seconds, and bytes above those before it (0 on CPU)."""
    accelerated = device.type != "cpu"
    before = 0
    if accelerated:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    value = work(loss, optimizer, micro_batches)
    if accelerated:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before if accelerated else 0
    return value.item(), seconds, peak


def held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights and optimizer state."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    kept = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in (*weights, *kept))


def adam(model: Any, device: Any) -> torch.optim.Optimizer:
    """The optimizer of every side."""
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type != "cpu")


def measure_ours(
    case: Case, size: str, repeats: Repeats, changes: dict[str, object], *, beside: bool
) -> dict[str, Any]:
    """Our report; with ``beside``, transformers' too, measured in turn in this process."""
    from megatron.mimo.arguments.standalone import build_model, model_settings, process_groups
    from megatron.mimo.checkpoints.weights import load_hugging_face
    from megatron.mimo.models import load_family

    family, config = load_family(case.family), case.configuration(size)
    dtype = case.sizes[size].dtype
    with process_groups() as device:
        changes |= {"gradient_accumulation_fusion": False}  # main_grad, which a DDP wrapper makes
        settings = model_settings(family, config, dtype=dtype, changes=changes)
        original: Any = reference(case, config, device, dtype)
        model = build_model(family, config, settings, device=device).train()
        load_hugging_face(model, original.state_dict(), family.keys(config))
        losses = our_losses(case, size, model, device)
        optimizers = dict.fromkeys(losses, adam(model, device))
        if beside:
            losses = {"transformers": theirs(case, size, original, device)} | losses
            optimizers["transformers"] = adam(original, device)
        del original
        return _report(case, size, losses, optimizers, repeats, device) | {
            "layers": settings.transformer.transformer_impl
        }


def measure_theirs(case: Case, size: str, repeats: Repeats) -> dict[str, Any]:
    """The report of transformers, in a process that holds nothing of Megatron."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = reference(case, case.configuration(size), device, case.sizes[size].dtype)
    plain = theirs(case, size, model, device)
    with torch.no_grad():
        first = plain().item()  # before the weights change
    optimizer = adam(model, device)
    kind, loss = _fastest_attention(plain, optimizer, device)
    both = {"transformers": loss}, {"transformers": optimizer}
    report = _report(case, size, *both, repeats, device)
    report["transformers"] |= {"first_loss": first, "attention": kind}
    return report


def _fastest_attention(loss: Loss, optimizer: Any, device: Any) -> tuple[str, Loss]:
    """The loss under the fastest of PyTorch's fused attentions, and its name."""
    if device.type == "cpu":
        return "default", loss
    from torch.nn.attention import SDPBackend, sdpa_kernel

    flash = SDPBackend.FLASH_ATTENTION  # takes no mask, but the encoder has none

    def under(*kinds: SDPBackend) -> Loss:
        def run() -> Tensor:
            with sdpa_kernel(list(kinds)) if kinds else nullcontext():
                return loss()

        return run

    choices = {
        "default": under(),
        "cudnn": under(SDPBackend.CUDNN_ATTENTION, flash),
        "efficient": under(SDPBackend.EFFICIENT_ATTENTION, flash),
    }
    seconds = {}
    for name, run in choices.items():
        try:
            seconds[name] = min(step(run, optimizer, device)[1] for _ in range(3))
        except RuntimeError as error:
            optimizer.zero_grad(set_to_none=True)
            sys.stderr.write(f"attention {name}: {error}\n")
    if not seconds:
        raise RuntimeError("transformers trains with none of PyTorch's attentions")
    best = min(seconds, key=lambda name: seconds[name])
    return best, choices[best]


def _report(
    case: Case, size: str, losses: dict[str, Loss], optimizers: Any, repeats: Repeats, device: Any
) -> dict[str, Any]:
    given = case.given(size)
    lengths = [one["input_ids"].size(1) for one in given]
    with torch.no_grad():
        first = {name: loss().item() for name, loss in losses.items()}
    gc.collect()
    gc.freeze()  # a run of ours does; no side looks through its modules in a timed step
    steps: dict[str, list[Any]] = {name: [] for name in losses}
    for _ in range(repeats.rounds + _WARM_UP):
        for name, loss in losses.items():
            steps[name].append(step(loss, optimizers[name], device, repeats.micro_batches))
    report: dict[str, Any] = {
        "micro_batches": repeats.micro_batches,
        "tokens": sum(lengths),
        "padded_tokens": len(lengths) * max(lengths),
        "dtype": str(case.sizes[size].dtype).removeprefix("torch."),
    }
    if device.type != "cpu":
        report["matmul_tflops"] = round(on_device.matmul_tflops(), 1)
    for name, made in steps.items():
        timed = made[_WARM_UP:]
        median = statistics.median(seconds for _, seconds, _ in timed)
        report[name] = {"first_loss": first[name], "step_ms": round(1e3 * median, 2)}
        if device.type != "cpu":
            peak = max(peak for *_, peak in timed) + held(optimizers[name])
            flops = real_flops(case, case.configuration(size), given) * repeats.micro_batches
            tflops = flops / median / 1e12
            report[name] |= {"memory_gb": round(peak / 1e9, 2), "tflops": round(tflops, 1)}
            report[name]["of_matmul"] = round(tflops / report["matmul_tflops"], 3)
            report[name] |= _on_device(losses[name], optimizers[name])
            whole = partial(work, losses[name], optimizers[name], repeats.micro_batches)
            busy = on_device.busy_ms(whole)
            report[name]["step_over_busy"] = busy and round(1e3 * median / busy, 3)
    return report


def _on_device(loss: Loss, optimizer: Any) -> dict[str, Any]:
    """What the device and the host do in forward and backward."""
    kept: list[Tensor] = []
    waits = on_device.host_waits(lambda: kept.append(loss()))
    waits_backward = on_device.host_waits(lambda: kept.pop().backward())
    busy = on_device.busy_ms(lambda: loss().backward())
    optimizer.zero_grad(set_to_none=True)
    return {
        "busy_ms": None if busy is None else round(busy, 1),
        "host_waits": len(waits),
        "host_waits_backward": len(waits_backward),
        "waits_at": sorted({*waits, *waits_backward})[:8],
    }


def compare(report: dict[str, Any], other: dict[str, Any]) -> None:
    """Add to our report how it stands to transformers'.

    Raises:
        SystemExit: the losses of the first step are of different models.
    """
    row = other["transformers"]
    ours = [report[name] for name in ("padded", "packed")]
    for one in ours:
        one["speedup"] = round(row["step_ms"] / one["step_ms"], 2)
    report["same_loss"] = max(abs(one["first_loss"] / row["first_loss"] - 1) for one in ours)
    if not report["same_loss"] < _SAME:
        sys.exit(f"not the same model: first losses differ by {report['same_loss']:.1%}, {report}")


def _theirs_elsewhere(arguments: argparse.Namespace, size: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", "transformers", "--json", "--size", size]
    command += ["--rounds", str(arguments.rounds), "--family", arguments.family]
    command += ["--micro-batches", str(arguments.micro_batches)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--family", choices=CASES, default="llava")
    sizes = sorted({size for case in CASES.values() for size in case.sizes})
    parser.add_argument("--size", choices=sizes, help="tiny without a GPU, 2b with one")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--micro-batches", type=int, default=1, metavar="N", help="of a step")
    parser.add_argument("--side", choices=("both", "ours", "transformers"), default="both")
    parser.add_argument("--transformer-impl", help="layers of our model; default: as in training")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON here as well")
    parser.add_argument(
        "--beside", type=Path, metavar="FILE", help="what --side transformers wrote, if it did"
    )
    arguments = parser.parse_args()
    if arguments.size and arguments.size not in CASES[arguments.family].sizes:
        known = ", ".join(CASES[arguments.family].sizes)
        parser.error(f"--size {arguments.size} with --family {arguments.family}; it has {known}")
    if arguments.side != "ours" and arguments.beside:
        parser.error("--beside goes with --side ours; leave it away")
    if arguments.side == "transformers" and arguments.transformer_impl:
        parser.error("--transformer-impl is of our model; leave it away")
    return arguments


def main() -> None:
    """Prints a table, or JSON."""
    arguments = _parse()
    if arguments.side == "transformers":
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # as if not there
    has_gpu, case = torch.cuda.is_available(), CASES[arguments.family]
    size = arguments.size or ("2b" if has_gpu else "tiny")
    given = arguments.transformer_impl
    changes = {"transformer_impl": given} if given else {}
    repeats = Repeats(arguments.rounds, arguments.micro_batches)
    if arguments.side == "transformers":
        report = measure_theirs(case, size, repeats)
    else:
        both = arguments.side == "both"
        other = _theirs_elsewhere(arguments, size) if both and has_gpu else None
        report = measure_ours(case, size, repeats, changes, beside=both and not has_gpu)
        if arguments.beside is not None and arguments.beside.is_file():
            other = json.loads(arguments.beside.read_text())
        if both:
            report["transformers"] = (other or report)["transformers"]
        if both or other is not None:
            compare(report, other or report)
    report |= {"family": case.family, "size": size, "torch": torch.__version__}
    text = json.dumps(report, indent=2)
    if arguments.output is not None:
        arguments.output.write_text(text)
    if arguments.json:
        print(text)
        return
    for name in ("transformers", "padded", "packed"):
        if name in report:
            row = report[name]
            print(f"{name:<14}{row['step_ms']:>10.1f} ms{row.get('speedup', 1):>8.2f} x")


if __name__ == "__main__":
    main()
