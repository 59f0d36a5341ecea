"""Rollout engines."""

from stepcredit.train.engine.hf import HFEngine
from stepcredit.train.engine.sampling import Sampling
from stepcredit.train.engine.transcript import Transcript

__all__ = ["HFEngine", "Sampling", "Transcript"]
