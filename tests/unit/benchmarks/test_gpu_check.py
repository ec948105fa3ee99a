"""``scripts/gpu_check``'s own machinery, with small commands for steps."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import reading, steps
from benchmarks.gpu_check.check_step import Step, StepError
from benchmarks.gpu_check.command import check, main
from benchmarks.gpu_check.machine import missing
from benchmarks.gpu_check.processes import run_limited
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.restart import restart
from benchmarks.gpu_check.running import Runner
from megatron.mimo.models import family_names

pytestmark = pytest.mark.slow  # processes and installations

MACHINE: dict[str, Any] = {
    "python": "3.12",
    "gpu": "a GPU",
    "capability": [8, 0],
    "packages": {"torch": "2.11.0", "transformer_engine": None},
}
# A shell that leaves a child behind and says its number.
CHILD = "sleep 600 & echo child $!; {}"


def test_every_family_is_verified() -> None:
    names = {step.name for step in steps.build_steps()}
    assert {f"verify.{name}.te" for name in family_names()} <= names


def shell(line: str, folder: Path, limit: float = 60.0) -> Any:
    return run_limited(
        ["/bin/sh", "-c", line],
        limit=limit,
        folder=folder,
        log=folder / "output",
        environment=os.environ,
    )


def is_gone(text: str) -> bool:
    """Whether the child that a shell spoke of ends (within a minute; a kill takes its time)."""
    status = Path("/proc") / text.split("child ")[1].split()[0] / "status"
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        try:
            if "State:\tZ" in status.read_text():
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_time_limit_ends_a_command_and_its_children(tmp_path: Path) -> None:
    ended = shell(CHILD.format("sleep 600"), tmp_path, limit=0.5)
    assert (ended.code, ended.reason) == (None, "time limit")
    assert is_gone(ended.text)


def test_a_command_that_ignores_the_signal_is_killed(tmp_path: Path) -> None:
    ended = shell("trap '' TERM; while :; do sleep 0.1; done", tmp_path, limit=0.3)
    assert ended.reason == "time limit"
    assert ended.seconds < 60


def test_children_do_not_outlive_a_command_that_ends(tmp_path: Path) -> None:
    ended = shell(CHILD.format("echo bad >&2; exit 3"), tmp_path)
    assert (ended.code, ended.reason) == (3, "")
    assert "bad" in ended.text
    assert is_gone(ended.text)


def python(name: str, code: str, **settings: Any) -> Step:
    given = {"expected": 0.0, "limit": 60.0} | settings
    return Step(name=name, title=f"what {name} does", command=("-c", code), **given)


def runner(tmp_path: Path, said: list[str], *, budget: float = 300.0, jobs: int = 2) -> Runner:
    return Runner(
        record=Record(tmp_path / "out", command="scripts/gpu_check", budget=budget),
        deadline=time.monotonic() + budget,
        root=tmp_path,
        work=tmp_path / "work",
        environment=os.environ,
        say=said.append,
        jobs=jobs,
    )


def results(run: Runner) -> dict[str, str]:
    return {name: outcome.result for name, (_, outcome) in run.record.outcomes.items()}


def test_goes_on_after_failures_and_records_everything(tmp_path: Path) -> None:
    said: list[str] = []
    run = runner(tmp_path, said)
    run.record.machine = MACHINE
    refuse = "import sys; print('error: FP8 | not here'); sys.exit(2)"
    number = 'print(\'noise\'); print(\'{"ms": 1.25, "deep": {"ms": 2, "other": 3}}\')'
    run.run_all(
        [
            python("bad", "print('first'); raise ValueError('wrong')"),
            python("refused", refuse, may_refuse=True),
            python("strict", refuse),
            python("hangs", "import time; time.sleep(600)", limit=1.0),
            python("silent", "", figures=reading.json_object),
            python("te", "", needs=("te",)),
            python("good", number, figures=reading.json_object, shown=("ms",), alone=True),
        ],
        MACHINE,
    )
    assert results(run) == {
        "bad": "failed",
        "refused": "refused",
        "strict": "failed",
        "hangs": "failed",
        "silent": "failed",
        "te": "not run",
        "good": "passed",
    }
    written = json.loads(run.record.json.read_text())
    found = {step["name"]: step for step in written["steps"]}
    assert found["bad"]["reason"] == "exit code 1: ValueError: wrong"
    assert found["bad"]["last_lines"][0] == "first"
    assert found["refused"]["reason"] == "error: FP8 | not here"
    assert found["hangs"]["reason"].startswith("time limit")
    assert found["silent"]["reason"] == "the output holds no JSON object"
    assert found["good"]["figures"] == {"ms": 1.25, "deep": {"ms": 2, "other": 3}}
    assert written["machine"] == MACHINE
    table = run.record.table.read_text().splitlines()
    assert table[0].startswith("`scripts/gpu_check`, ")
    assert "a GPU; Python 3.12; torch 2.11.0, megatron-core absent" in table[0]
    (good,) = (line for line in table if line.startswith("| `good`"))
    assert good.startswith("| `good` | what good does | passed | ms 1.25, deep: ms 2 |")
    assert any("error: FP8 \\| not here" in line for line in table)
    assert table[-1] == "- `te` (what te does): no usable Transformer Engine"
    assert "ValueError: wrong" in (run.record.logs / "bad.log").read_text()
    lines = [json.loads(line) for line in run.record.lines.read_text().splitlines()]
    assert sorted(lines, key=str) == sorted(written["steps"], key=str)  # as they ended
    assert len(list((tmp_path / "out").iterdir())) == 4
    assert len(said) == 7


def test_budget_is_kept_and_time_is_left_for_what_runs_alone(tmp_path: Path) -> None:
    run = runner(tmp_path, [], budget=40.0, jobs=1)
    run.run_all(
        [
            python("long", "", expected=35.0),  # 40 s, of which 10 belong to the last step
            python("hangs", "import time; time.sleep(600)", limit=1.5),
            python("last", "", expected=10.0, alone=True),
        ],
        MACHINE,
    )
    assert results(run) == {"long": "not run", "hangs": "failed", "last": "passed"}
    assert run.record.outcomes["long"][1].reason == "out of time"


def test_the_end_of_the_budget_ends_a_step(tmp_path: Path) -> None:
    run = runner(tmp_path, [], budget=1.0)
    run.run_all([python("hangs", "import time; time.sleep(600)", limit=600.0)], MACHINE)
    assert run.record.outcomes["hangs"][1].reason.startswith("time limit")
    assert time.monotonic() - run.deadline < 60


def test_what_was_done_is_on_disk_when_it_is_stopped(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if "first" in line:
            raise KeyboardInterrupt

    run = runner(tmp_path, [], jobs=1)
    run.say = stop
    with pytest.raises(KeyboardInterrupt):
        run.run_all(
            [python("first", ""), python("second", "import time; time.sleep(600)")], MACHINE
        )
    written = json.loads(run.record.json.read_text())
    assert [(one["name"], one["result"]) for one in written["steps"]] == [
        ("first", "passed"),
        ("second", "not run"),
    ]


@pytest.mark.parametrize(("code", "expected"), [("", 0), ("raise ValueError", 1)])
def test_exit_code(tmp_path: Path, monkeypatch: Any, code: str, expected: int) -> None:
    looked = python("machine", f"print({json.dumps(json.dumps(MACHINE))})")
    looked = Step(**{**vars(looked), "figures": reading.json_object})
    monkeypatch.setattr("benchmarks.gpu_check.command._MACHINE", looked)
    assert check(runner(tmp_path, []), [python("step", code)], cpu=False) == expected


def test_says_that_there_is_no_gpu(tmp_path: Path, monkeypatch: Any) -> None:
    looked = python("machine", "print('{\"gpu\": null}')", figures=reading.json_object)
    monkeypatch.setattr("benchmarks.gpu_check.command._MACHINE", looked)
    said: list[str] = []
    run = runner(tmp_path, said)
    assert check(run, [python("step", "")], cpu=False) == 2
    assert "no GPU" in said[-1]
    assert list(run.record.outcomes) == ["machine"]


def test_needs() -> None:
    assert missing(MACHINE, ("gpu",)) == ""
    assert missing(MACHINE, ("te", "fp8")) == (
        "no usable Transformer Engine; FP8 needs compute capability 8.9"
    )
    assert missing(MACHINE | {"capability": [9, 0]}, ("fp8",)) == ""
    assert missing({"gpu": None}, ("gpu",)) == "no GPU"


def test_chooses_steps_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    every = steps.build_steps()
    names = [one.name for one in every]
    assert len(set(names)) == len(names)
    chosen = steps.choose(every, ["digits", "fp8"], ["digits.te"])
    assert [one.name for one in chosen] == ["digits.local", "fp8"]
    verifications = steps.choose(every, ["verify.llava", "verify.qwen2_audio.te"], [])
    assert [one.name for one in verifications] == [
        "verify.llava.te",
        "verify.llava.local",
        "verify.qwen2_audio.te",
    ]
    assert main(["--list", "--only", "llava"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == [
        "llava.transformers",
        "llava.te",
        "llava.local",
    ]
    with pytest.raises(SystemExit):
        main(["--only", "digit"])
    assert "no step is called 'digit'" in capsys.readouterr().err


def curve(folder: Path, losses: list[float]) -> Path:
    (folder / "run").mkdir()
    lines = [f"{number},{loss!r}\n" for number, loss in enumerate(losses, start=1)]
    (folder / "run" / "loss.csv").write_text("iteration,loss\n" + "".join(lines) + "11,0.")
    return folder


def test_reads_a_training_run(tmp_path: Path) -> None:
    said = (
        "iteration 10/12  loss 1.0  9.5 samples/s  304 tokens/s  ETA 1 s\n"
        "iteration 12/12  loss 0.5  1.25k samples/s  40.0k tokens/s  ETA 0 s\n"
        "trained for 1 s  1.0 samples/s\n"
    )
    folder = curve(tmp_path, [10.0 - number for number in range(10)])
    assert reading.training(folder, said) == {
        "iterations": 10,
        "loss_first": 8.0,
        "loss_last": 3.0,
        "samples_per_s": 1250.0,
    }


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([1.0] * 10, "does not fall"),
        ([3.0, 2.0, float("nan"), *([1.0] * 10)], "loss of iteration 3 is not finite"),
        ([2.0, 1.0], "has 2 iterations"),
    ],
)
def test_refuses_a_bad_training_run(tmp_path: Path, losses: list[float], words: str) -> None:
    with pytest.raises(StepError, match=words):
        reading.training(curve(tmp_path, losses), "")


def test_reads_verify_and_pytest(tmp_path: Path) -> None:
    said = (
        "ok    logits      largest difference 2.8e-06 (allowed 1e-04) over 2 samples\n"
        "ok    gradients   of 48 parameters, 0 differ by more than 1e-03; the largest:\n"
        "        2.4e-06  modality_submodules\n"
    )
    assert reading.verified(tmp_path, said) == {"logits": 2.8e-6, "gradients": 2.4e-6}
    said = "FAILED x\n3 failed, 15 passed, 2 skipped in 9.12s\n"
    assert reading.tests_passed(tmp_path, said) == {"passed": 15, "skipped": 2, "failed": 3}


# A training command as ``restart`` knows it: it continues after the last iteration of loss.csv.
TRAINER = """
import signal, sys, time
path, forgets = sys.argv[2] + "/loss.csv", sys.argv[3] == "forgets"
signal.signal(signal.SIGTERM, lambda *_: globals().update(stopped=True))
stopped, lines = False, []
try:
    lines = open(path).read().splitlines()[1:]
except OSError:
    pass
done = 0 if forgets else len(lines)
with open(path, "w") as file:
    file.write("".join(line + "\\n" for line in ["iteration,loss", *lines[:done]]))
    while not stopped:
        done += 1
        file.write(f"{done},{1 / done + len(lines) * forgets}\\n")
        file.flush()
        time.sleep(0.05)
print(f"stopped at iteration {done}: checkpoint of iteration {done} in {path}")
"""


def test_restart_tells_a_run_that_continues(tmp_path: Path) -> None:
    trainer = [sys.executable, "-c", textwrap.dedent(TRAINER), "--output", str(tmp_path)]
    found = restart([*trainer, "continues"], tmp_path)
    first, second = found["saved_at"]
    assert second > first >= 4
    (tmp_path / "loss.csv").unlink()
    with pytest.raises(SystemExit, match=r"began anew|each once"):
        restart([*trainer, "forgets"], tmp_path)
