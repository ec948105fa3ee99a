"""The example script on an imported checkpoint: what it answers, and what it says if it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from megatron.mimo.models import load_family
from tests.rank_pool import RankPool

SCRIPT = Path(__file__).parents[3] / "examples/mimo/generate.py"
QUESTION = "What digits?"
NEW_TOKENS = 12


def import_tiny(folder: Path) -> str:
    """A checkpoint of a tiny LLaVA in ``folder``/checkpoint, and transformers' answer."""
    from megatron.mimo.convert.importing import import_model
    from megatron.mimo.recipes.tiny.processors import llava_processor

    family = load_family("llava")
    config = family.tiny()
    torch.manual_seed(6)
    model = family.reference(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.08 * torch.randn_like(parameter)
    processor: Any = llava_processor(config)
    model.save_pretrained(folder / "llava")
    processor.save_pretrained(folder / "llava")
    import_model(folder / "llava", folder / "checkpoint", shown=False)
    noise = torch.randint(0, 255, (40, 30, 3), generator=torch.Generator().manual_seed(2))
    image = Image.fromarray(noise.byte().numpy())
    image.save(folder / "a.png")
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[image, image], return_tensors="pt")
    whole = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        suppress_tokens=[config.image_token_index],
    )
    tokens = whole[0, inputs["input_ids"].size(1) :].tolist()
    (folder / "tokens.json").write_text(json.dumps(tokens))
    answer: str = processor.tokenizer.decode(tokens, skip_special_tokens=True)
    return answer


@pytest.fixture(scope="module")
def imported(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("generate")
    (answer,) = ranks(1)(import_tiny, folder)
    return folder, answer


def ask(ranks: RankPool, folder: Path, *flags: str, world_size: int = 1) -> tuple[list[int], str]:
    argv = [SCRIPT, "--checkpoint", folder / "checkpoint", "--prompt", QUESTION, *flags]
    exits = ranks.script(world_size, argv)
    printed = exits[0].stdout if exits[0].exit_code == 0 else exits[0].stderr
    assert all(one.stdout == "" for one in exits[1:])
    return [one.exit_code for one in exits], printed


@pytest.mark.parametrize("layout", ["one", "tensor", "pipeline"])
def test_answers_as_transformers_does(
    ranks: RankPool, imported: tuple[Path, str], layout: str
) -> None:
    folder, answer = imported
    image = str(folder / "a.png")
    flags = ["--image", image, "--image", image, "--max-new-tokens", str(NEW_TOKENS)]
    if layout == "one":
        codes, printed = ask(ranks, folder, *flags)
    else:
        flags += [f"--{layout}-model-parallel-size", "2"]
        codes, printed = ask(ranks, folder, *flags, world_size=2)
    assert set(codes) == {0}
    assert printed == answer + "\n"
    assert "move" in answer


def test_an_answer_ends_at_a_stop_text(ranks: RankPool, imported: tuple[Path, str]) -> None:
    folder, answer = imported
    stop = "move"
    image = str(folder / "a.png")
    length = str(NEW_TOKENS)
    codes, printed = ask(
        ranks, folder, "--image", image, image, "--max-new-tokens", length, "--stop", stop
    )
    assert codes == [0]
    assert printed == answer[: answer.index(stop)] + "\n"


def test_an_answer_ends_at_a_token_of_the_generation_config(
    ranks: RankPool, imported: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = imported
    tokens = json.loads((folder / "tokens.json").read_text())
    shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    config = tmp_path / "checkpoint/hf/generation_config.json"
    config.write_text(json.dumps({"eos_token_id": [2, tokens[5]]}))
    image = str(folder / "a.png")
    codes, printed = ask(
        ranks, tmp_path, "--image", image, image, "--max-new-tokens", str(NEW_TOKENS)
    )
    assert codes == [0]
    tokenizer = Tokenizer.from_file(str(folder / "llava/tokenizer.json"))
    assert printed == tokenizer.decode(tokens[: tokens.index(tokens[5])]) + "\n"
    assert len(printed) > 1


def rates(checkpoint: Path) -> list[float]:
    """Frames per second with which a checkpoint's assistant reads videos."""
    from megatron.mimo.arguments.standalone import process_groups
    from megatron.mimo.inference.assistant import open_assistant
    from megatron.mimo.recipes.media_flags import keep_media_settings

    with process_groups(tp_size=1, pp_size=1) as device:
        found = [open_assistant(checkpoint, device=device)._chat.video_fps]
        keep_media_settings(checkpoint / "hf", video_fps=8.0)
        found.append(open_assistant(checkpoint, device=device)._chat.video_fps)
        found.append(open_assistant(checkpoint, device=device, video_fps=0.5)._chat.video_fps)
    return found


def test_videos_are_read_as_in_training(
    ranks: RankPool, imported: tuple[Path, str], tmp_path: Path
) -> None:
    shutil.copytree(imported[0] / "checkpoint", tmp_path / "checkpoint")
    assert ranks(1)(rates, tmp_path / "checkpoint") == [[2.0, 8.0, 0.5]]


def test_what_is_wrong_is_said(ranks: RankPool, imported: tuple[Path, str]) -> None:
    folder, _ = imported
    (folder / "text.png").write_text("no image")
    image = str(folder / "a.png")
    for flags, message in (
        (["--image", "no.png"], "image no.png does not exist; correct the path"),
        (["--image", str(folder / "text.png")], "text.png does not decode as an image"),
        (["--video", "no.mp4"], "video no.mp4 does not exist"),
        (["--video-fps", "0"], "--video-fps is 0.0; expected more than 0"),
        (["--audio", image], "holds audio, which model family 'llava' does not take"),
        (["--prompt", "word " * 400], "tokens leaves no room for an answer within"),
        (["--top-p", "2"], "top_p is 2.0; expected 0 < top_p <= 1"),
        (["--tensor-model-parallel-size", "2"], "torchrun --nproc-per-node 2"),
        (["--checkpoint", str(folder)], "holds no checkpoint"),
    ):
        codes, printed = ask(ranks, folder, *flags)
        assert codes == [2], printed
        assert message in printed
        assert "Traceback" not in printed


def test_what_is_missing_in_the_checkpoint_is_said(
    ranks: RankPool, imported: tuple[Path, str], tmp_path: Path
) -> None:
    broken = tmp_path / "checkpoint"
    shutil.copytree(imported[0] / "checkpoint", broken)
    for name, message in (
        ("processor_config.json", "no processor that can be read"),
        ("generation_config.json", "generation_config.json is not JSON"),
        ("config.json", "config.json, which says what model it is"),
    ):
        if name == "generation_config.json":
            (broken / "hf" / name).write_text("{")
        else:
            (broken / "hf" / name).unlink()
        codes, printed = ask(ranks, tmp_path)
        assert codes == [2], printed
        assert message in printed
    given = str(imported[0] / "checkpoint" / "hf")
    codes, printed = ask(ranks, tmp_path, "--hf", given, "--max-new-tokens", "1")
    assert codes == [0], printed
