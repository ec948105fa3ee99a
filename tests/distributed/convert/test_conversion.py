"""Import and export: layouts, dtypes, file names, interruption, training from what was imported."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.convert.models import make_and_import, make_model, same_files
from tests.rank_pool import RankPool, model_parallel

NAME = "llava"


def save_on_ranks(folder: Path, tp: int, pp: int) -> None:
    """What a run of this layout saves, from Hugging Face's weights."""
    import shutil

    from safetensors.torch import load_file

    from megatron.core import dist_checkpointing
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.checkpoints.slots import STATE_METADATA
    from megatron.mimo.checkpoints.weights import load_hugging_face
    from megatron.mimo.models import load_family

    model_parallel(tp=tp, pp=pp)
    family = load_family(NAME)
    config = family.tiny()
    settings = model_settings(
        family, config, tp_size=tp, pp_size=pp, dtype=torch.bfloat16, changes={"vocab_size": 500}
    )
    model = build_model(family, config, settings, device=torch.device("cpu"))
    tensors = {}
    for path in (folder / "hf").glob("*.safetensors"):
        tensors |= load_file(path)
    load_hugging_face(model, tensors, family.keys(config))
    target = folder / "run" / "iter_0000007"
    if torch.distributed.get_rank() == 0:
        target.mkdir(parents=True)
        shutil.copytree(folder / "mimo" / "hf", folder / "run" / "hf")
        (folder / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    torch.distributed.barrier()
    dist_checkpointing.save(
        model.sharded_state_dict(metadata=dict(STATE_METADATA)),
        str(target),
        content_metadata=dict(STATE_METADATA),
    )


def export(checkpoint: Path, target: Path) -> str:
    from megatron.mimo.convert.exporting import export_model

    return export_model(checkpoint, target, shown=False)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_exports_what_any_layout_saved(ranks: RankPool, tmp_path: Path, tp: int, pp: int) -> None:
    ranks(1)(make_and_import, NAME, tmp_path, torch.bfloat16)
    ranks(tp * pp)(save_on_ranks, tmp_path, tp, pp)
    (said,) = ranks(1)(export, tmp_path / "run", tmp_path / "back")
    assert "run/iter_0000007" in said
    assert same_files(tmp_path / "hf", tmp_path / "back")


def load_on_ranks(folder: Path, tp: int, pp: int) -> None:
    """An imported checkpoint gives each rank what the weights in memory give it."""
    from safetensors.torch import load_file

    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.checkpoints.weights import load_hugging_face, load_weights
    from megatron.mimo.models import load_family

    model_parallel(tp=tp, pp=pp)
    family = load_family(NAME)
    config = family.tiny()
    settings = model_settings(family, config, tp_size=tp, pp_size=pp)
    models = [build_model(family, config, settings, device=torch.device("cpu")) for _ in range(2)]
    tensors = {}
    for path in (folder / "hf").glob("*.safetensors"):
        tensors |= load_file(path)
    load_hugging_face(models[0], tensors, family.keys(config))
    load_weights(models[1], folder / "mimo" / "release")
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_imports_for_any_layout(ranks: RankPool, tmp_path: Path, tp: int, pp: int) -> None:
    ranks(1)(make_and_import, NAME, tmp_path)
    ranks(tp * pp)(load_on_ranks, tmp_path, tp, pp)


def change_types(folder: Path) -> None:
    from transformers import AutoConfig
    from transformers import LlavaForConditionalGeneration as Llava

    from megatron.mimo.convert.exporting import export_model
    from megatron.mimo.convert.importing import import_model
    from megatron.mimo.convert.weights import Weights

    model = make_model(NAME, folder / "hf")
    import_model(folder / "hf", folder / "mimo", dtype=torch.bfloat16, shown=False)
    export_model(folder / "mimo", folder / "other", shown=False)
    assert AutoConfig.from_pretrained(folder / "other").dtype == torch.bfloat16
    (folder / "mimo" / "hf" / "mimo_weights.json").unlink()
    export_model(folder / "mimo", folder / "back", max_shard_size=100_000, shown=False)
    loaded = Llava.from_pretrained(folder / "back", dtype="auto").state_dict()
    assert AutoConfig.from_pretrained(folder / "back").dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        if "layers.2" not in name and "post_layernorm" not in name:
            assert torch.equal(loaded[name], tensor.to(torch.bfloat16)), name
    export_model(folder / "mimo", folder / "half", dtype=torch.float16, shown=False)
    assert AutoConfig.from_pretrained(folder / "half").dtype == torch.float16
    halves = Weights(folder / "half")
    for name in halves.by_name:
        assert torch.equal(halves.read(name), Weights(folder / "back").read(name).half()), name
    index = json.loads((folder / "back" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    for file in set(index["weight_map"].values()):
        assert (folder / "back" / file).stat().st_size < 140_000


def test_other_dtypes_and_files(ranks: RankPool, tmp_path: Path) -> None:
    ranks(1)(change_types, tmp_path)


def import_and_fail(folder: Path) -> dict[str, str]:
    """Errors by what was done to a model's directory."""
    from safetensors.torch import load_file, save_file

    from megatron.core.models.mimo.errors import MimoError
    from megatron.mimo.convert.importing import import_model

    make_model(NAME, folder / "hf")
    file = sorted((folder / "hf").glob("*.safetensors"))[0]
    (folder / "hf" / "model.safetensors.index.json").rename(folder / "index.json")
    whole = {}
    for path in list((folder / "hf").glob("*.safetensors")):
        whole |= load_file(path)
        path.unlink()
    key = "language_model.model.layers.0.self_attn.q_proj.weight"
    cases = {
        "missing": {name: tensor for name, tensor in whole.items() if name != key},
        "unexpected": whole | {"lora.x": torch.zeros(1)},
        "shape": whole | {key: torch.zeros(3, 3)},
        "dtype": whole | {key: whole[key].half()},
        "quantised": whole | {key: whole[key].to(torch.float8_e4m3fn)},
    }
    said = {}
    for case, tensors in cases.items():
        save_file(tensors, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
        try:
            import_model(folder / "hf", folder / "out", shown=False)
        except MimoError as error:
            said[case] = str(error)
    save_file(whole, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    tokenizer = folder / "hf" / "tokenizer.json"
    for case in ("tokenizer", "truncated"):
        tokenizer.write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
        if case == "truncated":
            tokenizer.unlink()
            os.truncate(folder / "hf" / "model.safetensors", 200_000)
        with pytest.raises(MimoError) as caught:
            import_model(folder / "hf", folder / "out", shown=False)
        said[case] = str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "index.json"], file
    return said


def test_names_what_does_not_fit(ranks: RankPool, tmp_path: Path) -> None:
    (said,) = ranks(1)(import_and_fail, tmp_path)
    assert (
        "1 weights are missing: language_model.model.layers.0.self_attn.q_proj" in said["missing"]
    )
    assert "1 are not known: lora.x" in said["unexpected"]
    assert "q_proj.weight is [3, 3], expected [64, 64]" in said["shape"]
    assert "have the dtypes torch.float16, torch.float32" in said["dtype"]
    assert "has no token 4, which config.json gives as the placeholder" in said["tokenizer"]
    assert "has 200000 bytes, expected" in said["truncated"]
    assert f"q_proj.weight, are of {torch.float8_e4m3fn}; expected" in said["quantised"]


def import_until(folder: Path, number: signal.Signals) -> int:
    """How a process ends (as ``os.wait`` says) that gets a signal after its first parameter."""
    from megatron.mimo.checkpoints import torch_dist as checkpoint
    from megatron.mimo.convert import command

    make_model(NAME, folder / "hf")
    child = os.fork()
    if child == 0:
        write, first = checkpoint.CheckpointFile.write, threading.Lock()

        def write_and_die(file: Any, piece: Any) -> None:
            write(file, piece)
            if first.acquire(blocking=False):  # other threads go on writing
                os.kill(os.getpid(), number)

        checkpoint.CheckpointFile.write = write_and_die  # type: ignore[method-assign]
        os._exit(command.main(["import", str(folder / "hf"), str(folder / "out")]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_killed_import_leaves_nothing_that_looks_complete(
    ranks: RankPool, tmp_path: Path
) -> None:
    assert ranks(1)(import_until, tmp_path, signal.SIGKILL) == [-signal.SIGKILL]
    assert not (tmp_path / "out").exists()
    left = [path for path in tmp_path.iterdir() if path.name != "hf"]
    assert left
    assert all(path.name.startswith("out.unfinished-") for path in left)
    assert not list(tmp_path.rglob(".metadata"))
    assert not list(tmp_path.rglob("latest_checkpointed_iteration.txt"))


def test_a_stopped_import_leaves_nothing(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks(1)(import_until, tmp_path, signal.SIGTERM) == [130]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def save_adapters(folder: Path) -> None:
    """A run of TP2 with ``--lora language``: what it saves, and what its flags leave behind."""
    import shutil
    from argparse import Namespace

    from megatron.core import dist_checkpointing
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.checkpoints.slots import STATE_METADATA
    from megatron.mimo.checkpoints.weights import load_weights
    from megatron.mimo.lora import LoraSettings, adapted, add_adapters
    from megatron.mimo.models import load_family

    model_parallel(tp=2)
    family = load_family(NAME)
    config = family.tiny()
    settings = model_settings(family, config, tp_size=2)
    model = build_model(family, config, settings, device=torch.device("cpu"))
    load_weights(model, folder / "mimo" / "release")
    settings = LoraSettings(modules=("language",), rank=4, alpha=8.0)
    add_adapters(model, settings)
    for number, (_, layer) in enumerate(adapted(model)):
        generator = torch.Generator().manual_seed(number)
        layer.adapter.up.data.normal_(std=0.2, generator=generator)
    for weight in model.modality_submodules["images"].input_projections.parameters():
        weight.data.mul_(1.1)  # trained as well, and not by adapters
    target = folder / "run" / "iter_0000003"
    if torch.distributed.get_rank() == 0:
        target.mkdir(parents=True)
        shutil.copytree(folder / "mimo" / "hf", folder / "run" / "hf")
        (folder / "run" / "latest_checkpointed_iteration.txt").write_text("3")
    torch.distributed.barrier()
    flags = Namespace(
        freeze=["images.encoders"],
        lora=list(settings.modules),
        lora_rank=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        lora_targets=list(settings.targets),
    )
    dist_checkpointing.save(
        {"args": flags, **model.sharded_state_dict(metadata=dict(STATE_METADATA))}, str(target)
    )


def adapters_against_peft(folder: Path) -> tuple[float, float]:
    """Of the logits: what the adapters change, and merged ones against PEFT's."""
    import peft
    from transformers import LlavaForConditionalGeneration as Llava

    from megatron.mimo.convert.exporting import export_model
    from megatron.mimo.models import load_family

    export_model(folder / "run", folder / "merged", shown=False)
    export_model(folder / "run", folder / "adapters", adapters_only=True, shown=False)
    family = load_family(NAME)
    example = family.example(family.tiny(), torch.Generator().manual_seed(1))
    with torch.no_grad():
        base = Llava.from_pretrained(folder / "hf").eval()
        before = base(**example).logits
        merged = Llava.from_pretrained(folder / "merged").eval()(**example).logits
        theirs = peft.PeftModel.from_pretrained(base, folder / "adapters").eval()(**example).logits
    return (merged - before).abs().max().item(), (merged - theirs).abs().max().item()


def test_exports_adapters_merged_or_alone(ranks: RankPool, tmp_path: Path) -> None:
    ranks(1)(make_and_import, NAME, tmp_path)
    ranks(2)(save_adapters, tmp_path)
    ((changed, difference),) = ranks(1)(adapters_against_peft, tmp_path)
    assert changed > 0.01
    assert difference < 1e-4
