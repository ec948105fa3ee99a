from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron.mimo.convert.command import main


@pytest.fixture
def empty_model(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    content = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(word) for word in argv]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err
    return said.err


def test_lists_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--list"]) == 0
    assert "llava\n" in capsys.readouterr().out


def test_refuses_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, empty_model: Path
) -> None:
    out = tmp_path / "out"
    for words in (("import", tmp_path / "none", out), ("export", tmp_path / "none", out)):
        assert "/none: there is no such folder; correct the path" in refused(capsys, *words)
    assert "has no config.json" in refused(capsys, "import", Path(__file__).parent, out)
    assert "has no model.safetensors" in refused(capsys, "import", empty_model, out)
    assert "is not empty" in refused(capsys, "import", empty_model, empty_model)
    assert "holds no checkpoint" in refused(capsys, "export", empty_model, out)
    assert "unknown model family 'lava'" in refused(capsys, "verify", "--tiny", "lava")
    assert "takes HF_DIR and CHECKPOINT" in refused(capsys, "verify", empty_model)
    assert "--dtype has no effect" in refused(
        capsys, "export", empty_model, out, "--adapters-only", "--dtype", "float16"
    )
    assert "--transformer-impl has no effect" in refused(
        capsys, "verify", empty_model, out, "--weights-only", "--transformer-impl", "local"
    )
    assert not out.exists()


@pytest.mark.parametrize("package", ["transformers", "safetensors"])
def test_says_which_package_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(capsys, "verify", "--tiny", "llava")
    assert f"need {package}" in said
    assert "pip install 'megatron-mimo[hf]'" in said


def test_says_which_architectures_there_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, empty_model: Path
) -> None:
    content = {"model_type": "llama", "architectures": ["LlavaForCausalLM"]}
    (empty_model / "config.json").write_text(json.dumps(content))
    said = refused(capsys, "import", empty_model, tmp_path / "out")
    assert "LlavaForCausalLM, which is not supported" in said
    assert "LlavaForConditionalGeneration" in said


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"vision_feature_select_strategy": "most"}, "('default', 'full'), got most; correct it"),
        ({"text_config": {"num_attention_heads": 0}}, "config.json cannot be read: "),
        ({"model_type": "foo"}, "does not recognize this architecture"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights (gptq)"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "weights (awq)"),
    ],
)
def test_refuses_configurations(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    empty_model: Path,
    changed: dict[str, object],
    words: str,
) -> None:
    content = json.loads((empty_model / "config.json").read_text())
    (empty_model / "config.json").write_text(json.dumps({**content, **changed}))
    said = refused(capsys, "import", empty_model, tmp_path / "out")
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("flags", [["--max-shard-size", "5TB"], ["--threads", "0"]])
def test_refuses_values(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", "a", "b", *flags])
    assert caught.value.code == 2
