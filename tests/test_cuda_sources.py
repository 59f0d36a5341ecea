"""The CUDA sources without a GPU: they compile for every architecture that is shipped, and no kernel spills registers.

What the kernels compute is not tested here; with a GPU the ops' own tests run them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
COMPILER = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.skipif(COMPILER is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_warnings_or_spills(source: Path, tmp_path: Path) -> None:
    known = subprocess.run(
        [str(COMPILER), "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout.split()
    capabilities = [cc for cc in (80, 90, 100) if f"compute_{cc}" in known]
    assert capabilities[:2] == [80, 90]
    architectures = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in capabilities]
    flags = ["-std=c++17", "-O3", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v"]
    command = [str(COMPILER), *flags, *architectures, f"-I{ROOT / 'csrc'}", "-c", source, "-o", tmp_path / "out.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(used) >= 2 * len(capabilities), done.stderr  # two dtypes
    assert {numbers[1:] for numbers in used} == {("0", "0")}, done.stderr
