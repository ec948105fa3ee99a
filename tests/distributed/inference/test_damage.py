"""Generation, export and verification of a checkpoint that was damaged."""

from __future__ import annotations

import io
import os
import shutil
from contextlib import redirect_stderr
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.chaos.damage import become_folder, become_pipe, flip
from tests.distributed.inference.test_command import QUESTION, SCRIPT, import_tiny
from tests.rank_pool import RankPool

LAST = "iter_0000006"


@pytest.fixture(scope="module")
def imported(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Hugging Face model, and a checkpoint of it at two iterations."""
    folder = tmp_path_factory.mktemp("damage")
    ranks(1)(import_tiny, folder)
    root = folder / "checkpoint"
    shutil.copytree(root / "release", root / "iter_0000003")
    (root / "release").rename(root / LAST)
    (root / "latest_checkpointed_iteration.txt").write_text("6")
    return folder


@pytest.fixture
def root(imported: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(imported / "checkpoint", tmp_path / "checkpoint"))


def test_every_rank_answers_from_the_one_before(ranks: RankPool, root: Path) -> None:
    argv = [SCRIPT, "--checkpoint", root, "--prompt", QUESTION, "--max-new-tokens", "4"]
    tp2 = ("--tensor-model-parallel-size", "2")
    whole = ranks.script(2, [*argv, *tp2])
    assert [one.exit_code for one in whole] == [0, 0], whole[0].stderr
    assert whole[0].stderr == ""
    name = sorted(path.name for path in (root / LAST).glob("__*_0.distcp"))[-1]
    flip(root / LAST / name, Random(0))
    become_pipe(root / "latest_checkpointed_iteration.txt", Random(0))
    exits = ranks.script(2, [*argv, *tp2])
    assert [one.exit_code for one in exits] == [0, 0], exits[0].stderr
    assert repr(exits[0].stdout) == repr(whole[0].stdout)
    assert exits[0].stderr.startswith(f"warning: {root}/latest_checkpointed_iteration.txt is dama")
    assert f"{LAST} is damaged: {name} has the hash " in exits[0].stderr
    assert exits[0].stderr.endswith(f"; using {root}/iter_0000003\n")
    assert exits[1].stdout + exits[1].stderr == ""
    (refused,) = ranks.script(1, [*argv, "--iteration", "6"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: iteration 6 was asked for: checkpoint ")
    assert "available: 3: name one of these" in refused.stderr
    become_folder(root / "iter_0000003/.metadata", Random(0))
    (refused,) = ranks.script(1, argv)
    assert refused.exit_code == 2
    assert "no complete checkpoint is left there; restore it" in refused.stderr
    assert refused.stderr.count("\n") == 1


def convert(root: Path, source: Path, target: Path, **how: Any) -> tuple[list[str], list[str]]:
    """What an export and a verification of the weights say, and what they warn of."""
    from megatron.mimo.convert.exporting import export_model
    from megatron.mimo.convert.verify import verify_checkpoint

    with redirect_stderr(io.StringIO()) as warned:
        said = [export_model(root, target, shown=False, **how)]
        said += map(str, verify_checkpoint(source, root, weights_only=True, **how))
    return said, warned.getvalue().splitlines()


def test_export_and_verify_take_the_one_before(
    ranks: RankPool, root: Path, imported: Path, tmp_path: Path
) -> None:
    flip(root / LAST / "__0_0.distcp", Random(0))
    flip(root / "hf/tokenizer.json", Random(0))
    (found,) = ranks(1)(convert, root, imported / "llava", tmp_path / "back")
    said, warned = found
    assert "(checkpoint/iter_0000003)" in said[0]
    assert all(line.startswith("ok") for line in said[1:]), said
    for number in (0, 2):  # of the export, of the verification
        assert f"{LAST} is damaged: __0_0.distcp has the hash " in warned[number]
        assert f"{root}/hf/tokenizer.json has the hash " in warned[number + 1]
        assert warned[number + 1].endswith(f"remove {root}/hf/mimo_hashes.json")
    assert not (tmp_path / "back/mimo_hashes.json").exists()
    os.remove(root / "hf/mimo_hashes.json")
    (found,) = ranks(1)(convert, root / "iter_0000003", imported / "llava", tmp_path / "again")
    assert found[1] == []
