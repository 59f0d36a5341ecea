from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from stepcredit import dispatch

X = torch.zeros(1)


@pytest.fixture
def op(monkeypatch):
    monkeypatch.setattr(dispatch, "_registry", {})
    monkeypatch.delenv("STEPCREDIT_IMPL", raising=False)
    dispatch.register("toy", "reference", dispatch.always)(lambda: "reference")
    dispatch.register("toy", "cpu", lambda *t: "it is Tuesday" if t and t[0].numel() == 2 else None)(lambda: "cpu")
    return "toy"


def test_order_and_fallback(op):
    assert dispatch.resolve(op, None, X) == "cpu"
    assert dispatch.resolve(op, None, torch.zeros(2)) == "reference"
    assert dispatch.function(op, "cpu")() == "cpu"
    assert dispatch.reasons(op, torch.zeros(2)) == {"cpu": "it is Tuesday", "reference": None}


def test_explicit_implementation_that_cannot_run_says_why(op):
    assert dispatch.resolve(op, "reference", X) == "reference"
    with pytest.raises(ValueError, match="toy: impl='cpu' cannot run: it is Tuesday"):
        dispatch.resolve(op, "cpu", torch.zeros(2))
    with pytest.raises(ValueError, match="impl='triton' does not exist; there are reference, cpu"):
        dispatch.resolve(op, "triton", X)


def test_environment_variable_forces(op, monkeypatch):
    monkeypatch.setenv("STEPCREDIT_IMPL", "reference")
    assert dispatch.resolve(op, None, X) == "reference"
    assert dispatch.resolve(op, "cpu", X) == "cpu"  # a call's own choice comes first
    monkeypatch.setenv("STEPCREDIT_IMPL", "cuda")
    with pytest.raises(ValueError, match="STEPCREDIT_IMPL='cuda' does not exist"):
        dispatch.resolve(op, None, X)


@pytest.fixture
def interpreted_op(op, monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch.register(op, "triton", dispatch.triton(torch.float32))(lambda: "triton")
    return op


def test_triton_comes_before_others_on_a_gpu_and_interprets_only_where_named(interpreted_op):
    assert dispatch.resolve(interpreted_op, None, X) == "cpu"
    assert dispatch.resolve(interpreted_op, "triton", X) == "triton"
    with FakeTensorMode():
        assert dispatch.resolve(interpreted_op, None, torch.zeros(1, device="cuda")) == "triton"


def test_triton_says_why_it_cannot_run(interpreted_op, monkeypatch):
    def reason(x):
        return dispatch.reasons(interpreted_op, x)["triton"]

    assert reason(X.long()) is None
    assert reason(X.half()) == "it serves float32, got float16"
    assert reason(X.to("meta")) == "it serves CUDA tensors, got one on meta"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert reason(X).startswith("it serves CUDA tensors, got one on cpu (Triton's interpreter")
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert reason(X) == "Triton is not installed"


def test_importing_the_package_does_not_import_triton():
    code = "import sys, stepcredit; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_is_refused_at_registration():
    with pytest.raises(ValueError, match="impl must be one of"):
        dispatch.register("toy", "fast", dispatch.always)


def test_every_op_has_a_reference_and_a_cpu_kernel():
    import stepcredit  # noqa: F401

    assert dispatch.ops()
    for name in dispatch.ops():
        assert {"reference", "cpu"} <= set(dispatch.reasons(name))


def test_machine_report():
    shown = subprocess.run([sys.executable, "-m", "stepcredit"], capture_output=True, text=True, check=True).stdout
    for name in dispatch.ops():
        assert name in shown
    assert "runs" in shown
