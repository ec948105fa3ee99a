"""Models put together from separate language models and encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rank_pool import RankPool
from tests.tiers import crossed

SCRIPT = Path(__file__).parents[3] / "examples/mimo/pretrain_mimo.py"
OWN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 32}


def make_language(
    folder: Path, *, kind: str = "llama", rows: int | None = None, tied: bool = False
) -> Any:
    """A language model and its tokenizer, which has neither placeholders nor padding."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron.mimo.models.common.tiny import TINY_TEXT

    torch.manual_seed(3)
    tokenizer = make_tokenizer({"<unk>": 0, "<s>": 1, "</s>": 2})
    tokenizer.pad_token = None
    tokenizer.chat_template = OWN_TEMPLATE
    tokenizer.save_pretrained(folder)
    sizes = {**TINY_TEXT, "vocab_size": rows or len(tokenizer), "pad_token_id": None}
    sizes |= EXPERTS if kind.endswith("_moe") else {}
    config = AutoConfig.for_model(kind, **sizes, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size=200_000)
    return model


def make_tokenizer(special: dict[str, int]) -> Any:
    from megatron.mimo.recipes.tiny.tasks import QUESTIONS
    from megatron.mimo.recipes.tiny.tokenizer import tiny_tokenizer

    return tiny_tokenizer(
        special, vocab_size=500, texts=QUESTIONS, bos="<s>", eos="</s>", pad="<unk>"
    )


def make_images(folder: Path, kind: str) -> Any:
    """A CLIP or SigLIP of this class, with an image processor."""
    import transformers

    from megatron.mimo.models.common.tiny import TINY_TEXT, TINY_VISION

    torch.manual_seed(4)
    family = kind.partition("VisionModel")[0].removesuffix("Model")
    if "VisionModel" in kind:
        config = getattr(transformers, f"{family}VisionConfig")(**TINY_VISION)
    else:
        text = {**TINY_TEXT, "num_key_value_heads": 4}
        config = getattr(transformers, f"{family}Config")(
            vision_config=TINY_VISION, text_config=text
        )
    model = getattr(transformers, kind)(config)
    model.save_pretrained(folder)
    side = TINY_VISION["image_size"]
    square = {"height": side, "width": side}
    if kind.startswith("Siglip"):
        transformers.SiglipImageProcessor(size=square).save_pretrained(folder)
    else:
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square)
        processor.save_pretrained(folder)
    return model


def make_audio(folder: Path) -> Any:
    """A Whisper with its decoder."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    from megatron.mimo.models import load_family
    from megatron.mimo.recipes.tiny.tasks import TONE_RATE

    torch.manual_seed(5)
    config = load_family("llava_avlm").tiny().audio_config
    sizes = {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    for name, size in {**sizes, "vocab_size": 50, "max_target_positions": 20}.items():
        setattr(config, name, size)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    config.decoder_start_token_id = 1
    model = WhisperForConditionalGeneration(config)
    model.generation_config.begin_suppress_tokens = None
    model.save_pretrained(folder)
    WhisperFeatureExtractor(
        feature_size=config.num_mel_bins,
        sampling_rate=TONE_RATE,
        hop_length=TONE_RATE // (2 * config.max_source_positions),
        chunk_length=1,
    ).save_pretrained(folder)
    return model


def exported(name: str, folder: Path, **parts: Path) -> tuple[str, Any]:
    """Put together, exported, verified and loaded by transformers: what was said, the model."""
    import transformers

    from megatron.mimo.convert.assembling import import_parts
    from megatron.mimo.convert.exporting import export_model
    from megatron.mimo.convert.verify import verify_checkpoint

    said = import_parts(name, parts, folder / "mimo", shown=False)
    export_model(folder / "mimo", folder / "back", shown=False)
    findings = verify_checkpoint(folder / "back", folder / "mimo")
    assert all(finding.equal for finding in findings), "\n".join(map(str, findings))
    model, info = transformers.AutoModelForMultimodalLM.from_pretrained(
        folder / "back", output_loading_info=True
    )
    assert not any(info.values()), info
    return said, model.eval()


def check_vocabulary(model: Any, language: Any, *, rows: int, new: list[int]) -> None:
    """The old rows are as they were, those of new tokens are their mean."""
    for kind in ("input", "output"):
        grown, all_old = (
            getattr(one, f"get_{kind}_embeddings")().weight for one in (model, language)
        )
        assert grown.shape[0] == rows
        kept = [token for token in range(len(all_old)) if token not in new]
        torch.testing.assert_close(grown[kept], all_old[kept], rtol=0, atol=0)
        for token in new:
            torch.testing.assert_close(grown[token], all_old[kept].mean(dim=0))


def text_logits(model: Any, rows: int) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.arange(5, 25)[None]).logits
    return logits[0, :, :rows]


def put_llava_together(folder: Path) -> None:
    language, clip = make_language(folder / "l"), make_images(folder / "i", "CLIPModel")
    said, model = exported("llava", folder, language=folder / "l", images=folder / "i")
    assert "added to the tokenizer: <image> (313), <pad> (314)" in said
    assert "the vocabulary has 320 rows (the language model's 313)" in said
    assert "normal with standard deviation 0.1): multi_modal_projector.linear_1.weight" in said
    assert "18 weights" in said  # a layer of CLIP and its last norm
    check_vocabulary(model, language, rows=320, new=[*range(313, 320)])
    torch.testing.assert_close(text_logits(model, 313), text_logits(language.eval(), 313))
    pixels = torch.randn(2, 3, 24, 24)
    tower = model.model.vision_tower.eval()
    with torch.no_grad():
        seen = [
            one(pixels, output_hidden_states=True).hidden_states
            for one in (tower, clip.vision_model.eval())
        ]
    for found, expected in zip(*seen, strict=True):  # the unused layer as well
        torch.testing.assert_close(found, expected)
    projector = model.model.multi_modal_projector
    assert float(projector.linear_1.weight.std()) == pytest.approx(0.1, rel=0.1)
    assert not projector.linear_2.bias.any()


def templates(folder: Path) -> str:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder / "mimo/hf")
    parts = [{"type": "image"}, {"type": "text", "text": "Which? "}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "7"}]
    return str(processor.apply_chat_template(messages, tokenize=False))


def test_llava_of_parts_is_its_parts_and_trains(ranks: RankPool, tmp_path: Path) -> None:
    ranks(1)(put_llava_together, tmp_path)
    assert ranks(1)(templates, tmp_path) == ["<s>[user]<image>Which?[assistant]7"]
    argv = [SCRIPT, "--recipe", "llava_tiny", "--stage", "projector", "--train-iters", "3"]
    argv += ["--load", tmp_path / "mimo", "--output", tmp_path / "run"]
    (done,) = ranks.script(1, argv)
    assert done.exit_code == 0, done.stdout + done.stderr
    config = json.loads((tmp_path / "run/checkpoints/hf/config.json").read_text())
    assert config["image_token_index"] == 313


def make_sentencepiece(folder: Path) -> None:
    """The tokenizer of a folder in the form that Vicuna has: no tokenizer.json."""
    import sentencepiece

    (folder / "tokenizer.json").unlink()
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"question {i}: {i * 7}" for i in range(99)),
            model_writer=file,
            model_type="bpe",
            vocab_size=60,
            minloglevel=2,
        )
    config = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}
    config |= {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def put_llava_next_together(folder: Path) -> None:
    language = make_language(folder / "l", rows=400, tied=True)
    make_sentencepiece(folder / "l")
    make_images(folder / "i", "SiglipVisionModel")
    said, model = exported("llava_next", folder, language=folder / "l", images=folder / "i")
    assert "image_newline" in said
    assert model.config.vision_feature_select_strategy == "full"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    check_vocabulary(model, language, rows=400, new=[60, 61])


def put_qwen3_together(folder: Path, name: str, kind: str) -> None:
    language = make_language(folder / "l", kind=kind)
    make_images(folder / "i", "CLIPVisionModel")
    _, model = exported(name, folder, language=folder / "l", images=folder / "i")
    torch.testing.assert_close(text_logits(model, 313), text_logits(language.eval(), 313))


def put_llava_avlm_together(folder: Path) -> None:
    language = make_language(folder / "l", rows=330)
    tokens = {"<unk>": 0, "<s>": 1, "</s>": 2, "<audio>": 3, "<image>": 4}
    (folder / "l/chat_template.jinja").unlink()
    make_tokenizer(tokens).save_pretrained(folder / "l")
    make_images(folder / "i", "CLIPVisionModelWithProjection")
    whisper = make_audio(folder / "a")
    said, model = exported(
        "llava_avlm", folder, language=folder / "l", images=folder / "i", audio=folder / "a"
    )
    assert "vocabulary" not in said  # it had all tokens, and rows for them
    assert "chat template: LLaVA's" in said
    assert (model.config.audio_token_index, model.config.image_token_index) == (3, 4)
    check_vocabulary(model, language, rows=330, new=[])
    frames = torch.randn(1, 16, 60)
    with torch.no_grad():
        heard = [
            one(frames).last_hidden_state
            for one in (model.audio_tower, whisper.model.encoder.eval())
        ]
    torch.testing.assert_close(*heard)


@pytest.mark.parametrize("put_together", [put_llava_next_together, put_llava_avlm_together])
def test_other_families_of_parts(ranks: RankPool, tmp_path: Path, put_together: Any) -> None:
    ranks(1)(put_together, tmp_path)


@pytest.mark.parametrize(("name", "kind"), crossed(["llava", "llava_next"], ["qwen3_moe", "qwen3"]))
def test_language_models_with_norms_of_queries_and_experts(
    ranks: RankPool, tmp_path: Path, name: str, kind: str
) -> None:
    ranks(1)(put_qwen3_together, tmp_path, name, kind)


def read_a_word_as_placeholder(folder: Path) -> None:
    """The vocabulary has the placeholder among its words, of which a text gets the letters."""
    from transformers import AutoTokenizer

    from megatron.mimo.convert.part_tokens import add_tokens

    make_tokenizer({"<unk>": 0, "<s>": 1, "</s>": 2}).save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["<image>"] = 313
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 313 not in tokenizer("a <image>").input_ids
    growth, notes = add_tokens(tokenizer, {"images": "<image>"}, 320)
    assert tokenizer("a <image>").input_ids.count(313) == 1
    assert (growth.rows, growth.tokens, notes) == (320, (), [])


def test_placeholders_that_are_words_become_tokens(ranks: RankPool, tmp_path: Path) -> None:
    ranks(1)(read_a_word_as_placeholder, tmp_path)


def refusals(folder: Path) -> dict[str, str]:
    """What is said of wrong command lines and directories."""
    import contextlib
    import io

    from megatron.mimo.convert.command import main

    language, images, target = folder / "l", folder / "i", folder / "out"
    make_language(language)
    make_images(images, "CLIPVisionModel")
    both = [f"--part=language={language}", f"--part=images={images}"]
    llava = ["--family", "llava"]
    lines = {
        "missing": [*llava, both[0]],
        "unknown": [*llava, *both, f"--part=audio={images}"],
        "kind": [*llava, both[0], f"--part=images={language}"],
        "family": ["--family", "qwen2_audio", *both],
        "twice": [*llava, *both, both[0]],
        "no parts": llava,
        "no family": both,
    }
    said = {}

    def run(case: str, line: list[str]) -> None:
        text = io.StringIO()
        with contextlib.redirect_stderr(text):
            assert main(["import", *line, str(target)]) == 2, case
        said[case] = text.getvalue()

    for case, line in lines.items():
        run(case, line)
    processor = images / "preprocessor_config.json"
    content = json.loads(processor.read_text())
    processor.write_text(json.dumps({**content, "crop_size": {"height": 16, "width": 16}}))
    run("size", [*llava, *both])
    processor.unlink()
    run("processor", [*llava, *both])
    (language / "tokenizer.json").unlink()
    run("tokenizer", [*llava, *both])
    (language / "tokenizer.model").touch()
    run("sentencepiece", [*llava, *both])
    assert sorted(path.name for path in folder.iterdir()) == ["i", "l"]
    return said


def test_refuses_by_name_and_leaves_nothing(ranks: RankPool, tmp_path: Path) -> None:
    (said,) = ranks(1)(refusals, tmp_path)
    assert "missing images; give --part language=DIR --part images=DIR" in said["missing"]
    assert "unknown audio; give --part language=DIR --part images=DIR" in said["unknown"]
    assert "part images" in said["kind"]
    assert "'llama'; expected one of clip" in said["kind"]
    assert "expected one of llava, llava_avlm, llava_next" in said["family"]
    assert "twice" in said["twice"]
    assert "--part NAME=HF_DIR for each part" in said["no parts"]
    assert "--part NAME=HF_DIR for each part" in said["no family"]
    assert "makes images of [3, 16, 16], and its encoder takes [3, 24, 24]" in said["size"]
    assert "part images" in said["processor"]
    assert "copy the model's preprocessor_config.json there" in said["processor"]
    assert "copy the model's tokenizer.json there" in said["tokenizer"]
    assert "its tokenizer.model; pip install 'megatron-mimo[hf]'" in said["sentencepiece"]
