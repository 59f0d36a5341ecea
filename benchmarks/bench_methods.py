"""What a training step costs with each credit method, on one batch: `pytest benchmarks/bench_methods.py`.

A step is rollout, credit and update, of a policy in the shape of SmolLM2-135M with random weights. The batch is written
by a script. The update is the trainer's own, at a learning rate of 0, so that every method sees the same policy. The
rollout is the bundled engine's: it samples as many tokens as the policy wrote in the batch, in turns as long, and reads
passages as long. Retrieval takes no time here; a real one makes every share of the step smaller.

* `one_update`: one optimizer step a batch, which needs no old log-probs.
* `two_updates`: two, each on half of the rollouts. The update then computes old log-probs first, unless the credit
  brought them from a pass of its own.

Every round runs the rollout, then each method's credit and update, in another order each round; what counts are medians
over rounds, of which a row holds the number. Updates that run the same tokens towards the same teacher are the same
work, so that a round runs them once and the methods share the time. Overheads are over `search_r1`: of the whole step,
and of credit and update alone. The memory that `sd_search` adds has a row of its own, beside the size of the logits of
its query tokens.

Two methods are for rollouts of another kind. The questions have a construction path, as if an examiner had begun with a
passage and searched as often as a rollout does, which only `pi_play` reads. Its row is a step of the student: the
examiner's own rollouts and updates are no part of it. `clarify` is given the batch as dialogues, the same tokens with
queries as questions to a user and passages as replies, on which `search_r1` does the same work; replies of a real user
are shorter. It is measured at the beginning of the training, when a teacher weighs its advantages, all others at the
end, when `sd_search` has had its warm-up.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any, cast

import pytest
import torch

from benchmarks.measure import DEVICE, peak_bytes, synchronised
from benchmarks.scripted_batch import PROTOCOL, Script, as_dialogue, policy, words_only
from benchmarks.shapes import SHAPES
from stepcredit.batch import RolloutBatch
from stepcredit.credit import (
    IGPO,
    TIPS,
    Clarify,
    CoMAM,
    Credit,
    CreditMethod,
    GiGPO,
    IGSearch,
    MRSearch,
    MultiSearch,
    PiPlay,
    SDSearch,
    SearchR1,
    StepSearch,
)
from stepcredit.credit.base import taught_by_average, taught_by_reference
from stepcredit.rollout import Rollout
from stepcredit.scorer import PolicyScorer
from stepcredit.train.average import AveragePolicy
from stepcredit.train.engine import HFEngine, Sampling
from stepcredit.train.optimizer import MasterAdamW
from stepcredit.train.update import policy_update
from stepcredit.train.update_config import LossConfig

#: Its `tau` is also that of the average it is taught by.
PI_PLAY = PiPlay()

#: The methods that are measured, each with its default constants; the first is what the others are compared with.
METHODS: dict[str, CreditMethod] = {
    "search_r1": SearchR1(),
    "ig_search": IGSearch(),
    "sd_search": SDSearch(),
    "multi_search": MultiSearch(),
    "igpo": IGPO(),
    "gigpo": GiGPO(),
    "tips": TIPS(),
    "step_search": StepSearch(),
    "mr_search": MRSearch(),
    "comam": CoMAM(),
    "pi_play": PI_PLAY,
    "clarify": Clarify(),
}
#: What the papers say a method adds to a training step's time.
PAPERS = {"ig_search": 0.064, "sd_search": 0.155}
UPDATES = {"one_update": LossConfig(), "two_updates": LossConfig(minibatches=2)}
#: Rounds: so many, but none that would start after so many seconds.
ROUNDS, SECONDS = 3, 450.0 if DEVICE == "cpu" else 15.0
DTYPES = [torch.float32 if DEVICE == "cpu" else torch.bfloat16]
#: How the metrics end that count rollouts without a teacher.
LEFT_OUT = ("without_path", "without_block", "too_long")
#: Largest difference of a packed score to a separate forward, nats per token, at which a method still counts as right.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}


@dataclass
class Measured:
    """Seconds by round; tokens run through the model, by part."""

    rollout: list[float] = field(default_factory=list)
    credit: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    update: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))

    def seconds(self, name: str, *, rollout: bool) -> float:
        """Median seconds of a method's credit and update, and of the rollout."""
        taken = median(self.credit[name]) + median(self.update[name])
        return taken + (median(self.rollout) if rollout else 0.0)

    def overhead(self, name: str, *, rollout: bool) -> float:
        """What a method adds to the seconds of `search_r1`, as a share of these."""
        return self.seconds(name, rollout=rollout) / self.seconds("search_r1", rollout=rollout) - 1


class Step:
    """One training step by parts, on one batch; `updates` names how many optimizer steps it has."""

    def __init__(self, shape: str, dtype: torch.dtype) -> None:
        size = dict(SHAPES["methods"][shape])
        self.scorer = policy(*(size.pop(name) for name in ("layers", "width", "vocabulary")), dtype=dtype)
        self.script = Script(self.scorer, **size)
        self.batch = RolloutBatch.pack(self.script.rollouts, DEVICE)
        self.dialogues = RolloutBatch.pack([as_dialogue(rollout) for rollout in self.script.rollouts], DEVICE)
        self.optimizer = MasterAdamW(self.scorer.model)
        self.average = AveragePolicy(self.scorer, self.optimizer, PI_PLAY.tau)
        self.engine = HFEngine(self.scorer.model, self.scorer.tokenizer, PROTOCOL)

    def rollout(self) -> list[Rollout]:
        turn, answer = map(len, self.script.written)
        sampling = Sampling(max_turn_tokens=turn, max_answer_tokens=answer)
        with words_only(self.scorer):
            environment = cast(Any, self.script)
            return self.engine.rollout(self.script.questions, environment, sampling, group_size=self.script.size)

    def credit(self, method: CreditMethod, updates: str, *, verify: bool = False) -> Credit:
        """As the trainer calls it, when the method does all that it does: at the end of the training or, of clarify, at
        the beginning."""
        batch, progress = (self.dialogues, 0.0) if isinstance(method, Clarify) else (self.batch, 1.0)
        temperature = 1.0 if UPDATES[updates].optimizer_steps > 1 else None
        teacher: dict[str, PolicyScorer] = {"teacher": self.scorer} if taught_by_reference(method) else {}
        if taught_by_average(method):
            teacher = {"teacher": self.average.scorer}
        return method(batch, self.scorer, progress=progress, temperature=temperature, verify=verify, **teacher)

    def update(self, name: str, credit: Credit, updates: str) -> dict[str, float]:
        """As the trainer does it; an average of the policy moves, and is compared with the policy, after each."""
        settings = {"learning_rate": 0.0, "temperature": 1.0}
        metrics = policy_update(self.scorer, self.optimizer, self.batch, credit, UPDATES[updates], **settings)
        if taught_by_average(METHODS[name]):
            self.average.update()
            self.average.distance()
        return metrics

    def work(self, name: str, credit: Credit) -> object:
        """What an update runs: the tokens with an advantage, the teacher, and whether old log-probs are known."""
        used = (self.batch.policy_mask & (credit.advantages != 0)).cpu().numpy().tobytes()
        return used, None if credit.distillation is None else name, credit.logprobs is None


@cache
def step_of(shape: str, dtype: torch.dtype) -> Step:
    return Step(shape, dtype)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    result: list[Any] = []
    run = synchronised(lambda: result.append(function()))
    start = time.perf_counter()
    run()
    return result[0], time.perf_counter() - start


def check(step: Step, updates: str, dtype: torch.dtype) -> None:
    """A wrong result has no speed: scores are those of separate forwards, what the environment wrote has no advantage,
    a distillation leaves advantages as they are, no teacher leaves out a rollout, and the engine samples as many
    tokens as the batch's policy wrote."""
    plain = step.credit(METHODS["search_r1"], updates)
    for name, method in METHODS.items():
        credit = step.credit(method, updates, verify=True)
        apart = credit.metrics.get("ig/audit_difference", 0.0)
        assert apart < TOLERANCE[dtype], f"{name} differs from separate forwards by {apart}"
        assert bool(credit.advantages.isfinite().all()), f"{name} has advantages that are not finite"
        assert not bool(credit.advantages[~step.batch.policy_mask].any()), f"{name} credits the environment"
        left_out = {metric: count for metric, count in credit.metrics.items() if metric.endswith(LEFT_OUT) and count}
        assert not left_out, f"{name} leaves out rollouts: {left_out}"
        if credit.distillation is not None:
            assert torch.equal(credit.advantages, plain.advantages), f"{name} changes advantages"
    for found, written in zip(step.rollout(), step.script.rollouts, strict=True):
        lengths = [[s.stop - s.start for s in rollout.turns()] for rollout in (found, written)]
        assert lengths[0] == lengths[1], f"the engine's turns have {lengths[0]} tokens, the batch's {lengths[1]}"


@cache
def measured(shape: str, dtype: torch.dtype, updates: str) -> Measured:
    """All methods on one batch, round by round."""
    check(step_of("small", dtype), updates, dtype)
    step, found = step_of(shape, dtype), Measured()
    started = time.perf_counter()
    if shape != "small":  # moments of the optimizer, and threads
        step.update("search_r1", step.credit(METHODS["search_r1"], updates), updates)
    for number in range(1 if shape == "small" else ROUNDS):
        if found.rollout and time.perf_counter() - started > SECONDS:
            break
        before = step.engine.tokens_forwarded
        found.rollout.append(timed(step.rollout)[1])
        found.tokens["rollout"] = {"all": step.engine.tokens_forwarded - before}
        shared: dict[object, tuple[dict[str, float], float]] = {}
        names = list(METHODS)
        for name in names[number:] + names[:number]:
            credit, taken = timed(lambda name=name: step.credit(METHODS[name], updates))
            found.credit[name].append(taken)
            work = step.work(name, credit)
            if work not in shared:
                shared[work] = timed(lambda name=name, credit=credit: step.update(name, credit, updates))
            metrics, taken = shared[work]
            found.update[name].append(taken)
            tokens = {"credit": credit.metrics.get("tokens_forwarded", 0.0), "update": metrics["tokens_forwarded"]}
            found.tokens[name] = {part: int(count) for part, count in tokens.items()}
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("updates", UPDATES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES["methods"])
def test_methods(benchmark: Any, shape: str, dtype: torch.dtype, updates: str, method: str) -> None:
    found = measured(shape, dtype, updates)
    benchmark.pedantic(lambda: None, rounds=1)  # all was timed above, in one run; `seconds` below replaces this
    info = benchmark.extra_info
    info |= {
        "seconds": found.seconds(method, rollout=False),
        "rounds": len(found.rollout),
        "rollout_seconds": median(found.rollout),
        "credit_seconds": median(found.credit[method]),
        "update_seconds": median(found.update[method]),
        "rollout_tokens": found.tokens["rollout"]["all"],
        **{f"{part}_tokens": count for part, count in found.tokens[method].items()},
        "step_overhead": found.overhead(method, rollout=True),
        "credit_and_update_overhead": found.overhead(method, rollout=False),
    }
    if method in PAPERS:
        info["paper_step_overhead"] = PAPERS[method]


@pytest.mark.parametrize("memory", ["memory of sd_search"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES["methods"])
def test_memory(benchmark: Any, shape: str, dtype: torch.dtype, memory: str) -> None:
    step, credits = step_of(shape, dtype), {}
    step.update("search_r1", step.credit(METHODS["search_r1"], "one_update"), "one_update")  # moments of the optimizer

    def run(name: str) -> None:
        credits[name] = step.credit(METHODS[name], "one_update")
        step.update(name, credits[name], "one_update")

    peaks = {name: peak_bytes(lambda name=name: run(name)) for name in ("search_r1", "sd_search")}
    benchmark.pedantic(lambda: run("sd_search"), rounds=1)
    distilled = int(credits["sd_search"].metrics["sd/tokens_distilled"])
    benchmark.extra_info |= {
        "peak_bytes": peaks["sd_search"],
        "search_r1_peak_bytes": peaks["search_r1"],
        "peak_above_search_r1_bytes": peaks["sd_search"] - peaks["search_r1"],
        "logits_bytes": distilled * SHAPES["methods"][shape]["vocabulary"] * 4,
    }
