from __future__ import annotations

import functools
import os
import shutil

# Nothing may reach for a hub; the setting is read when the libraries are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when Triton is imported: without a GPU kernels run on the CPU, interpreted, where a test names impl="triton".
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import settings

# CI must not depend on luck: the same examples each time. HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and friends hold NaN, so that an output element nobody wrote is seen."""

    def poisoned(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            out = function(*args, **kwargs)
            if torch.compiler.is_compiling() or not isinstance(out, torch.Tensor) or out.device.type == "meta":
                return out
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
