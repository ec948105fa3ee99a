"""Kills at random moments: the same command continues with the same losses, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import psutil

from megatron.mimo.process.board import Board, SlotContent
from tests.chaos.tally import Tally
from tests.distributed.training.launch import RECIPE, SCRIPT, losses, start, train
from tests.rank_pool import RankPool

__all__ = ["kill_launchers", "kill_runs"]

_FLAGS = (
    *("--train-iters", "14", "--save-interval", "3", "--eval-iters", "2", "--eval-interval", "4"),
    *("--log-interval", "1"),
)
# layout and flags of the runs that are killed
_RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "one": ("one", ()),
    "dp2": ("dp2", ()),
    "dp2, distributed optimizer, asynchronous": ("dp2-zero", ("--async-save",)),
    "tp2, readers": ("tp2", ("--num-workers", "1")),
    "dp2, readers, asynchronous": ("dp2", ("--num-workers", "2", "--async-save")),
    "pp2": ("pp2", ()),
}
_PHASES = (
    *("starting", "building the model", "preparing the data", "loading a checkpoint"),
    *("reading data", "forward", "backward", "saving", "saving", "saving", "evaluating"),
    "evaluating and reporting",
)
# Where readers and writers of checkpoints are at work.
_WITH_CHILDREN = ("reading data", "forward", "backward", "saving")
_VICTIMS = ("rank", "rank", "job", "child", "child", "child")
_PATIENCE = 240.0  # seconds for a run that takes two
_ORPHANS = 5.0  # seconds in which ranks end with their launcher


def kill_runs(ranks: RankPool, *, seed: int, seconds: float, at_most: int | None = None) -> Tally:
    """Kill a rank, all, or a process that a rank has started; continue; compare the losses."""
    tally = Tally(kind="kills")
    begin = time.monotonic()
    whole: dict[str, dict[int, str]] = {}
    with _folder() as folder:
        while time.monotonic() - begin < seconds and (at_most is None or tally.cases < at_most):
            label = f"kills --seed {seed} --case {tally.cases}"
            random = Random(f"{seed}/kills/{tally.cases}")
            name = random.choice(list(_RUNS))
            if name not in whole:
                whole[name] = _uninterrupted(ranks, folder / "whole", name)
            output = folder / "broken"
            try:
                what = _kill_once(ranks, output, name, random)
                _continue(ranks, output, name)
                if losses(output) != whole[name]:
                    raise AssertionError(f"{losses(output)} instead of {whole[name]}")
                tally.outcomes[what] += 1
            except AssertionError as error:
                tally.fail(f"{label} ({name}): {error}")
            shutil.rmtree(output, ignore_errors=True)
    tally.seconds = time.monotonic() - begin
    return tally


def kill_launchers(
    ranks: RankPool, *, seed: int, seconds: float, at_most: int | None = None
) -> Tally:
    """Kill torchrun or this project's launcher: no rank lives on, and the run continues exactly."""
    tally = Tally(kind="launchers")
    begin = time.monotonic()
    with _folder() as folder:
        whole = _uninterrupted(ranks, folder / "whole", "dp2")
        while time.monotonic() - begin < seconds and (at_most is None or tally.cases < at_most):
            label = f"launchers --seed {seed} --case {tally.cases}"
            random = Random(f"{seed}/launchers/{tally.cases}")
            output = folder / "broken"
            try:
                what = _kill_launcher(output, random)
                _continue(ranks, output, "dp2")
                if losses(output) != whole:
                    raise AssertionError(f"{losses(output)} instead of {whole}")
                tally.outcomes[what] += 1
            except AssertionError as error:
                tally.fail(f"{label}: {error}")
            shutil.rmtree(output, ignore_errors=True)
    tally.seconds = time.monotonic() - begin
    return tally


def _uninterrupted(ranks: RankPool, output: Path, name: str) -> dict[int, str]:
    _continue(ranks, output, name)
    found = losses(output)
    shutil.rmtree(output)
    return found


def _continue(ranks: RankPool, output: Path, name: str) -> None:
    layout, flags = _RUNS[name]
    exits = train(ranks, output, layout, *_FLAGS, *flags)
    text = "".join(exit_.stdout + exit_.stderr for exit_ in exits)
    assert all(exit_.exit_code == 0 for exit_ in exits), f"it does not continue: {text[-3000:]}"
    assert (output / "metrics.json").is_file(), text[-3000:]


def _kill_once(ranks: RankPool, output: Path, name: str, random: Random) -> str:
    """Start a run and kill something of it in a phase that the lot decides; what was done."""
    layout, flags = _RUNS[name]
    phase, victim = random.choice(_PHASES), random.choice(_VICTIMS)
    if victim == "child":
        has_children = "readers" in name or "asynchronous" in name
        victim, phase = (
            ("child", random.choice(_WITH_CHILDREN)) if has_children else ("rank", phase)
        )
    after = random.randrange(10)
    pause = random.choice([0.0, random.random() * 0.02, random.random() * 0.2])
    run = start(ranks, output, layout, *_FLAGS, *flags)
    end = time.monotonic() + _PATIENCE
    slot: SlotContent | None = None
    while run.running() and slot is None:
        assert time.monotonic() < end, "the run hangs before it is killed"
        slot = next(
            (
                slot
                for slot in _slots(output).values()
                if slot.phase == phase
                and (slot.iteration >= after or slot.iteration == 0)
                and (victim != "child" or _children(slot.process.pid))
            ),
            None,
        )
        time.sleep(0.002)
    if slot is None:
        run.wait()
        return "ended before its kill"
    time.sleep(pause)
    done = _strike(run, slot, victim)
    exits = run.wait()
    assert all(exit_.stopped != "timeout" for exit_ in exits), "the ranks hang after a kill"
    return f"{done} killed in {phase}"


def _strike(run: object, slot: SlotContent, victim: str) -> str:
    pid = slot.process.pid
    try:
        if victim == "child":
            children = _children(pid)
            if not children:
                return "nothing, which had ended, was"
            children[-1].kill()
            return "child"
        if victim == "job":
            run.signal(signal.SIGKILL)  # type: ignore[attr-defined]
            return "job"
        os.kill(pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return "nothing, which had ended, was"
    return "rank"


def _children(pid: int) -> list[psutil.Process]:
    """What a rank has started to read data or to write a checkpoint."""
    try:
        found = psutil.Process(pid).children(recursive=True)
        return [child for child in found if "witness" not in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def _slots(output: Path) -> dict[int, SlotContent]:
    """What the ranks of the run in ``output`` do, by the process that owns the folder."""
    try:
        owner = json.loads((output / ".owner").read_text())["pid"]
    except (OSError, ValueError):
        return {}
    root = Path(tempfile.gettempdir()) / f"megatron-mimo-{os.getuid()}"
    for folder in root.glob("*"):
        try:
            slots = Board(folder).slots()
        except OSError:  # it is being removed
            continue
        if any(slot.process.pid == owner for slot in slots.values()):
            return slots
    return {}


def _kill_launcher(output: Path, random: Random) -> str:
    module = random.choice(["torch.distributed.run", "megatron.mimo.process.launch"])
    phase, after = random.choice(["forward", "saving", "evaluating"]), random.randrange(10)
    command = [
        *(sys.executable, "-m", module, "--standalone", "--nproc-per-node", "2", SCRIPT),
        *(*RECIPE, "--output", output, *_FLAGS),
    ]
    root = str(SCRIPT.parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    with tempfile.TemporaryFile("w+") as printed:
        launcher = subprocess.Popen(
            command, cwd=root, env=environment, stdout=printed, stderr=subprocess.STDOUT
        )
        end = time.monotonic() + _PATIENCE
        slots: dict[int, SlotContent] = {}
        while launcher.poll() is None:
            assert time.monotonic() < end, "the run hangs before its launcher is killed"
            slots = _slots(output)
            if any(s.phase == phase and s.iteration >= after for s in slots.values()):
                break
            time.sleep(0.002)
        launcher.kill()
        launcher.wait()
        end = time.monotonic() + _ORPHANS
        while any(slot.process.lives() for slot in slots.values()):
            assert time.monotonic() < end, f"ranks outlive {module}, killed in {phase}"
            time.sleep(0.01)
    return f"{module} killed in {phase}"


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        yield Path(name)
