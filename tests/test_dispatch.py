from __future__ import annotations

import subprocess
import sys

import pytest
import torch

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
