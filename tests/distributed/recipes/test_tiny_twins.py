"""The tiny twins of the recipes: they learn, in any layout, from files too, and leave with all."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron.mimo.recipes import recipe_names
from megatron.mimo.recipes.media_flags import kept_video_fps
from tests.distributed.training.launch import LAYOUTS, SCRIPT, losses
from tests.rank_pool import RankPool, ScriptRun
from tests.tiers import some
from tests.time_limits import HANG

WIDE = (pytest.mark.wide,)
TINY = [name for name in recipe_names() if name.endswith("_tiny")]
ITERATIONS = 8


def start(ranks: RankPool, recipe: str, output: Path, layout: str, *flags: str) -> ScriptRun:
    world_size, layout_flags = LAYOUTS[layout]
    argv = [SCRIPT, "--recipe", recipe, "--output", output, *layout_flags, *flags]
    return ranks.start_script(world_size, argv, timeout=HANG)


def finished(run: ScriptRun) -> str:
    """What rank 0 of a run that has to succeed said."""
    exits = run.wait()
    assert [exit_.exit_code for exit_ in exits] == [0] * len(exits), "\n".join(
        exit_.stdout + exit_.stderr for exit_ in exits
    )
    return exits[0].stdout + exits[0].stderr


def only(iterations: int) -> tuple[str, ...]:
    """Flags of a run that is left after so many, and so evaluates nothing."""
    return "--train-iters", str(iterations + 1), "--exit-interval", str(iterations)


Twins = Callable[[str], Path]


@pytest.fixture(scope="module")
def twins(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """The output of a twin, trained in one process when it is first asked for."""
    folder = tmp_path_factory.mktemp("twins")

    def trained(name: str) -> Path:
        finished(start(ranks, name, folder / name, "one", "--train-iters", str(ITERATIONS)))
        return folder / name

    return cache(trained)


def from_checkpoint(twin: Path) -> tuple[str, ...]:
    """Flags of a run that begins with a twin's weights and is left after four iterations."""
    return "--load", str(twin / "checkpoints"), "--finetune", *only(4)


Losses = Callable[[str], list[float]]


@pytest.fixture(scope="module")
def expected_losses(
    ranks: RankPool, twins: Twins, tmp_path_factory: pytest.TempPathFactory
) -> Losses:
    """The losses of a twin that goes on in one process, from its checkpoint."""
    folder = tmp_path_factory.mktemp("expected")

    def trained(name: str) -> list[float]:
        finished(start(ranks, name, folder / name, "one", *from_checkpoint(twins(name))))
        return [float(loss) for loss in losses(folder / name).values()]

    return cache(trained)


@pytest.mark.parametrize(
    "name", some(TINY, *(name for name in TINY if not name.startswith("qwen3_5")))
)
def test_the_loss_falls_and_the_run_leaves_all_that_export_needs(twins: Twins, name: str) -> None:
    found = [float(loss) for loss in losses(twins(name)).values()]
    assert len(found) == ITERATIONS
    assert found[0] > 4.5  # log(500) = 6.2: nothing is known
    assert sum(found[-3:]) / 3 < 0.7 * found[0]
    metrics = json.loads((twins(name) / "metrics.json").read_text())
    assert 0 <= metrics["answers_right"] <= 1
    assert metrics["test_samples"] == 32
    kept = {path.name for path in (twins(name) / "checkpoints/hf").iterdir()}
    assert {"config.json", "generation_config.json", "processor_config.json"} <= kept
    assert {"tokenizer.json", "chat_template.jinja"} <= kept


def export_and_verify(checkpoint: Path, target: Path) -> list[str]:
    """What differs between the exported directory, in transformers, and the checkpoint, in ours."""
    from transformers import AutoProcessor

    from megatron.mimo.convert.exporting import export_model
    from megatron.mimo.convert.verify import verify_checkpoint

    export_model(checkpoint, target, shown=False)
    findings = verify_checkpoint(target, checkpoint)
    assert {"weights", "logits", "gradients", "generation"} <= {one.title for one in findings}
    processor = AutoProcessor.from_pretrained(target)
    assert processor.tokenizer.chat_template or processor.chat_template
    return [str(one) for one in findings if not one.equal]


@pytest.mark.parametrize("name", some(TINY, "qwen3_vl_moe_tiny"))
def test_what_was_trained_says_the_same_in_transformers(
    ranks: RankPool, twins: Twins, tmp_path: Path, name: str
) -> None:
    assert ranks(1)(export_and_verify, twins(name) / "checkpoints", tmp_path / "hf") == [[]]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(
            pytest.param(name, "tp2", marks=() if name == "qwen3_vl_moe_tiny" else WIDE)
            for name in TINY
        ),
        pytest.param("qwen2_5_vl_tiny", "pp2", marks=WIDE),
        pytest.param("qwen3_vl_tiny", "pp2", marks=WIDE),
    ],
)
def test_layouts_give_the_same_losses(
    ranks: RankPool,
    twins: Twins,
    expected_losses: Losses,
    tmp_path: Path,
    name: str,
    layout: str,
) -> None:
    """From a checkpoint of one process; there the weights are the same.

    A vocabulary of 500 is padded to 504 rows, and under TP2 to 512.
    """
    # Megatron trains experts under tensor parallelism with sequence parallelism only.
    cut = ("--sequence-parallel",) if (layout, "moe" in name) == ("tp2", True) else ()
    finished(start(ranks, name, tmp_path, layout, *from_checkpoint(twins(name)), *cut))
    expected = expected_losses(name)
    assert list(map(float, losses(tmp_path).values())) == pytest.approx(expected, rel=1e-5)
    assert expected[0] < 4.5  # the checkpoint's weights, not random ones


MODALITIES = {"qwen2_audio_tiny": ["audio"], "llava_avlm_tiny": ["images", "audio"]}


@pytest.mark.parametrize("name", some(TINY, "qwen3_vl_moe_tiny"))
def test_grids_give_the_same_losses_and_a_checkpoint_as_any(
    ranks: RankPool, twins: Twins, expected_losses: Losses, tmp_path: Path, name: str
) -> None:
    """From a checkpoint: every third on ranks of its modules' own, others with two stages."""
    modules = [f"{one}=dp=2" for one in MODALITIES.get(name, ["images"])]
    apart = TINY.index(name) % 3 == 1
    grids = ("--component", *modules, "language=rank_offset=2" if apart else "language=pp=2")
    output = tmp_path / "grids"
    argv = [SCRIPT, "--recipe", name, "--output", output, *from_checkpoint(twins(name)), *grids]
    finished(ranks.start_script(3 if apart else 2, argv, timeout=HANG))
    found = list(map(float, losses(output).values()))
    assert found == pytest.approx(expected_losses(name), rel=1e-5)
    assert ranks(1)(export_and_verify, output / "checkpoints", tmp_path / "hf") == [[]]


def write_conversations(folder: Path, count: int) -> Path:
    """Images of one grey each: dark or bright."""
    lines = []
    for number in range(count):
        Image.new("RGB", (30, 20), (60 + 130 * (number % 2),) * 3).save(folder / f"{number}.png")
        asked = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": "Which?"}]
        answer = ("dark", "bright")[number % 2]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}))
    file = folder / "conversations.jsonl"
    file.write_text("\n".join(lines))
    return file


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Parameters of a checkpoint, by name."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, torch.Tensor] = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(checkpoint),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return {
        name: value
        for name, value in state.items()
        if name.startswith(("language_model", "modality_submodules")) and torch.is_tensor(value)
    }


def test_the_recipe_of_7b_trains_a_checkpoint_of_its_family_on_files(
    ranks: RankPool, twins: Twins, tmp_path: Path
) -> None:
    """Sizes and processor are the checkpoint's; only the projector of stage projector changes."""
    file = write_conversations(tmp_path, 8)
    long = {"from": "human", "value": "long " * 90}, {"from": "gpt", "value": "Yes."}
    with file.open("a") as lines:
        lines.write("\n" + json.dumps({"conversations": long}))
    loaded = twins("llava_tiny") / "checkpoints"
    output = tmp_path / "out"
    run = start(
        ranks,
        "llava_1_5_7b",
        output,
        "one",
        *("--load", str(loaded), "--finetune", "--stage", "projector"),
        *("--data-path", str(file), "--valid-data-path", str(file)),
        *("--train-iters", "12", "--seq-length", "96", "--global-batch-size", "8", "--lr", "1e-2"),
        *("--lr-decay-style", "constant", "--lr-warmup-fraction", "0"),
        *("--eval-iters", "1", "--eval-interval", "6", "--num-workers", "1", "--video-fps", "8"),
        *("--on-too-long", "skip"),
    )
    printed = finished(run)
    assert "stage projector" in printed
    assert "validation: loss" in printed
    assert f"left out, too long (1 so far): {file}, line 9: " in printed
    found = [float(loss) for loss in losses(output).values()]
    assert found[-1] < 0.8 * found[0]
    before = weights(loaded / f"iter_{ITERATIONS:07d}")
    after = weights(output / "checkpoints/iter_0000012")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".input_projections." in name}
    mine, theirs = output / "checkpoints/hf", loaded / "hf"
    assert (mine / "config.json").read_text() == (theirs / "config.json").read_text()
    assert (kept_video_fps(mine), kept_video_fps(theirs)) == (8.0, 2.0)


def test_a_broken_file_ends_the_run_by_its_name(ranks: RankPool, tmp_path: Path) -> None:
    file = write_conversations(tmp_path, 4)
    (tmp_path / "2.png").write_text("no image")
    exits = start(ranks, "llava_tiny", tmp_path / "out", "tp2", "--data-path", str(file)).wait()
    said = "".join(exit_.stdout + exit_.stderr for exit_ in exits)
    assert exits[0].exit_code == 1, said
    assert exits[1].exit_code != 0, said
    assert f"{file}, line 3: {tmp_path}/2.png does not decode as an image" in said


def test_stage_lora_trains_adapters_alone(ranks: RankPool, twins: Twins, tmp_path: Path) -> None:
    loaded = twins("llava_tiny") / "checkpoints"
    flags = ("--load", str(loaded), "--finetune", "--stage", "lora", "--train-iters", "8")
    finished(start(ranks, "llava_tiny", tmp_path, "one", *flags))
    found = [float(loss) for loss in losses(tmp_path).values()]
    assert sum(found[-3:]) < sum(found[:3])
    before = weights(loaded / f"iter_{ITERATIONS:07d}")
    after = weights(tmp_path / "checkpoints/iter_0000008")
    unchanged = [
        name
        for name in before
        if name.startswith("language_model.") and torch.equal(before[name], after[name])
    ]
    assert unchanged == [name for name in before if name.startswith("language_model.")]
    assert len(after) > len(before)
