"""The steps of the check, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.gpu_check import reading
from benchmarks.gpu_check.check_step import Step
from megatron.mimo.models import family_names

__all__ = ["build_steps", "choose"]

_KINDS = {
    "te": ("transformer_engine", "with Transformer Engine"),
    "local": ("local", "without Transformer Engine"),
}
_TRAIN = "examples/mimo/pretrain_mimo.py"
_TWIN = ("--recipe", "llava_1_5_7b_tiny", "--micro-batch-size", "1", "--global-batch-size", "4")
_PACKED = (*_TWIN, "--pack", "--seq-length", "384", "--max-position-embeddings", "384")
_DIGITS = (
    *("--recipe", "digits", "--micro-batch-size", "128", "--lr-warmup-iters", "5"),
    *("--eval-iters", "0"),
)
_OUTPUT = ("--output", "{work}/run")
_MERGING = (
    *("forward_speedup", "forward_backward_speedup", "host_syncs_forward", "host_syncs_backward"),
    *("forward_device_ms", "stock_forward_device_ms", "copy_device_ms", "forward_host_ms"),
    *("forward_backward_device_ms", "stock_forward_backward_device_ms"),
    *("peak_extra_bytes_forward", "stock_peak_extra_bytes_forward"),
    *("forward_over_copy", "forward_backward_over_copy", "forward_launches"),
    "forward_backward_launches",
)
_STEP = (
    *("step_ms", "speedup", "busy_ms", "memory_gb", "host_waits", "tflops", "of_matmul"),
    *("attention", "matmul_tflops", "same_loss"),
)


def build_steps(*, cpu: bool = False, full: bool = False) -> list[Step]:
    """All steps, in the order in which they are begun.

    Args:
        cpu: small work, for a machine without a GPU; what needs one is left out for that reason.
        full: more iterations and rounds.
    """
    steps = [*_trainings(cpu=cpu, full=full), *_verifications(), _tests()]
    steps += _benchmarks(cpu=cpu, full=full)
    if cpu:  # a CPU trains all the same
        return [replace(one, needs=tuple(n for n in one.needs if n != "gpu")) for one in steps]
    return steps


def choose(steps: Sequence[Step], only: Sequence[str], skip: Sequence[str]) -> list[Step]:
    """The steps that are asked for; a name up to a dot stands for all that begin so.

    Raises:
        ValueError: a name that no step has.
    """

    def named(step: Step, names: Sequence[str]) -> bool:
        return any(f"{step.name}.".startswith(f"{name}.") for name in names)

    for name in (*only, *skip):
        if not any(named(one, [name]) for one in steps):
            raise ValueError(f"no step is called {name!r}; --list lists them")

    return [one for one in steps if (not only or named(one, only)) and not named(one, skip)]


def _trainings(*, cpu: bool, full: bool) -> list[Step]:
    iterations = str(12 if cpu else 200 if full else 60)
    length = ("--train-iters", iterations, *_OUTPUT)
    longer = {"expected": 90.0, "limit": 180.0} if full else {"expected": 40.0, "limit": 100.0}
    steps = [
        Step(
            name="restart",
            title="SIGTERM saves, the same command continues",
            command=("-m", "benchmarks.gpu_check.restart", _TRAIN, *_DIGITS, *_endless()),
            needs=("gpu",),
            expected=50.0,
            limit=140.0,
            figures=reading.json_object,
        )
    ]
    for kind, (layers, words) in _KINDS.items():
        needs = ("gpu", "te") if kind == "te" else ("gpu",)
        layers_flag = ("--transformer-impl", layers)
        steps += [
            Step(
                name=f"digits.{kind}",
                title=f"recipe digits, {words}",
                command=(_TRAIN, *_DIGITS, *layers_flag, *length),
                needs=needs,
                figures=reading.training,
                **longer,
            ),
            Step(
                name=f"packed.{kind}",
                title=f"LLaVA's twin on packed sequences, {words}",
                command=(_TRAIN, *_PACKED, *layers_flag, *length),
                needs=needs,
                figures=reading.training,
                **longer,
            ),
        ]
    steps.append(
        Step(
            name="lora",
            title="adapters on LLaVA's twin, with Transformer Engine",
            command=(_TRAIN, *_TWIN, "--stage", "lora", *length),
            needs=("gpu", "te"),
            figures=reading.training,
            **longer,
        )
    )
    return [*steps, _profile(), *_formats(length, longer)]


def _profile() -> Step:
    span = ("--profile-step-start", "10", "--profile-step-end", "13", "--train-iters", "14")
    return Step(
        name="profile",
        title="a profile (`--profile`) of LLaVA's twin on packed sequences",
        command=(_TRAIN, *_PACKED, "--profile", *span, *_OUTPUT),
        needs=("gpu",),
        figures=reading.profile,
    )


def _formats(length: tuple[str, ...], longer: dict[str, float]) -> list[Step]:
    """FP8 on packed sequences, CUDA graphs on padded ones."""
    return [
        Step(
            name="fp8",
            title="FP8 (`--fp8-format hybrid`), LLaVA's twin on packed sequences",
            command=(_TRAIN, *_PACKED, "--fp8-format", "hybrid", *length),
            needs=("gpu", "te", "fp8"),
            may_refuse=True,
            figures=reading.training,
            **longer,
        ),
        *(
            Step(
                name=f"graphs.{kind}",
                title=f"CUDA graphs (`--cuda-graph-impl local`), the same on padded rows, {words}",
                command=(
                    *(_TRAIN, *_TWIN, "--cuda-graph-impl", "local"),
                    *("--transformer-impl", layers, *length),
                ),
                needs=("graphs", "te") if kind == "te" else ("graphs",),
                may_refuse=True,
                figures=reading.training,
                **longer,
            )
            for kind, (layers, words) in _KINDS.items()
        ),
    ]


def _endless() -> tuple[str, ...]:
    return ("--train-iters", "100000", "--eval-interval", "100000", *_OUTPUT)


def _verifications() -> list[Step]:
    return [
        Step(
            name=f"verify.{family}.{kind}",
            title=f"`verify --tiny {family}`, {words}",
            command=(
                *("-m", "megatron.mimo.convert", "verify", "--tiny", family),
                *("--transformer-impl", layers),
            ),
            needs=("gpu", "te") if kind == "te" else ("gpu",),
            figures=reading.verified,
        )
        for family in family_names()
        for kind, (layers, words) in _KINDS.items()
    ]


def _tests() -> Step:
    return Step(
        name="tests",
        title="`pytest --gpu`",
        command=(
            # A line for each test as it ends: a log that is cut off says how far it came.
            *("-m", "pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors"),
            *("--gpu", "--durations=15", "tests"),
        ),
        needs=("gpu", "pytest"),
        expected=45.0,
        limit=150.0,
        figures=reading.tests_passed,
    )


def _benchmarks(*, cpu: bool, full: bool) -> list[Step]:
    small = ("--batch", "2", "--sequence", "256", "--hidden", "64", "--repeats", "3")
    size = ("--size", "tiny", "--rounds", "1")
    if not cpu:
        size = ("--size", "2b", "--rounds", "20" if full else "8")
    lengths = ("--lengths", "256", "512") if cpu else ("--device", "cuda")
    alone = Step(
        name="",
        title="",
        command=(),
        needs=("gpu",),
        alone=True,
        expected=30.0,
        limit=120.0 if full else 80.0,
        figures=reading.json_object,
        shown=_STEP,
    )
    return [
        replace(
            alone,
            name="alignment",
            title="merging rows, beside megatron-core's MIMO",
            command=("benchmarks/alignment.py", "--json", *(small if cpu else ())),
            shown=_MERGING,
        ),
        *_steps_of_models(alone, size),
        replace(
            alone,
            name="linear_attention",
            title="the gated delta rule, beside attention and the recurrence",
            command=("benchmarks/linear_attention.py", "--json", *lengths),
            figures=reading.by_length,
            shown=(),
        ),
    ]


def _steps_of_models(alone: Step, size: tuple[str, ...]) -> list[Step]:
    """A training step in transformers, then ours beside it."""
    steps = []
    for family, name in (("llava", "LLaVA"), ("qwen3_vl", "Qwen3-VL")):
        step = ("benchmarks/llava.py", "--family", family, "--json", *size, "--side")
        theirs = f"{{shared}}/{family}.json"
        steps.append(
            replace(
                alone,
                name=f"{family}.transformers",
                title=f"a step of {name} in transformers",
                command=(*step, "transformers", "--output", theirs),
                expected=35.0,
            )
        )
        for kind, (layers, words) in _KINDS.items():
            ours = replace(
                alone,
                name=f"{family}.{kind}",
                title=f"the same step of ours, {words}",
                command=(*step, "ours", "--transformer-impl", layers, "--beside", theirs),
                needs=("gpu", "te") if kind == "te" else ("gpu",),
            )
            steps.append(ours)
    return steps
