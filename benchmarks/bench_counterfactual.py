"""Counterfactual scoring against separate contexts: `pytest benchmarks/bench_counterfactual.py`.

Five ways to score every search step of a group of rollouts under its own and N other passages:

* `separate`: as IG-Search's released code does it: all contexts of the batch left-padded to the longest of them, with a
  mask and positions, and whole sequences through verl's plain `compute_log_prob`, which computes the logits of every
  position and keeps the answer's; a micro-batch holds the contexts of a step;
* `trimmed`: separate contexts at their best: a batch for each step, as wide as its own contexts, logits of the answer
  only;
* `cached`: each context a continuation of a kept cache of the rollout, the N others as one batch; rollouts share
  nothing, not even their prompt;
* ours, unfolded: one packed pass;
* ours, folded: what it adds to the packed pass over the policy's old log-probs, which GRPO makes anyway.

All run in alternating rounds, each way once a round, after a warm-up on the small shape and under an allocator that
keeps its memory (`allocator.memory_kept`). A way costs what it costs in its best round: whatever else a machine does
only adds to a time. What folding adds is a difference of two such costs, the pass with scores less the pass without;
the smallest difference within a round would be that of the round in which the pass without was disturbed most. Medians
of the ratios within a round stand beside the ratios of best rounds.

On a CPU a round takes minutes. So the first three ways, whose work is the same for every rollout of the group, run on
its first rollout and count as many times as there are rollouts; `separate`, whose micro-batches are all of one size,
runs one of them. Ours runs whole, for its rollouts share a prompt. A short run finds a quiet moment more easily than a
long one, so best rounds favour the baselines. In the first round allocations are counted too.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from benchmarks.allocator import memory_kept
from benchmarks.measure import DEVICE, another_round, peak_bytes, seconds
from benchmarks.scripted_batch import PROTOCOL, WORDS, policy
from benchmarks.shapes import SHAPES
from stepcredit import Question, RolloutBatch, SpanKind
from stepcredit.branches.policy_tokens import score_tokens
from stepcredit.counterfactual import StepGains, score_steps
from stepcredit.scorer import PolicyScorer
from stepcredit.train.engine import Transcript

#: Largest difference of a score, nats per token, at which a way still counts as right.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}


#: Returns scores [steps, 1 + N] of the first steps or all, or log-probs, and tokens forwarded (padding included).
Pass = Callable[[], tuple[torch.Tensor, int]]
BASELINES = ("separate", "trimmed", "cached")


@dataclass(frozen=True)
class Way:
    """One way, run once: its scores, tokens and seconds for all steps, most bytes alive at once (None: not counted)."""

    scores: torch.Tensor
    tokens: int
    seconds: float
    peak_bytes: int | None


Round = dict[str, Way]


#: Width and vocabulary of SmolLM2-135M.
SMOLLM2 = {"width": 576, "vocabulary": 49152}


def small_policy() -> PolicyScorer:
    """Its tokenizer is every policy's here."""
    return policy(2, **SMOLLM2, dtype=torch.float32)


def text(tokens: int, seed: object) -> str:
    """Words that take this many tokens."""
    rng, scorer, words = random.Random(repr(seed)), small_policy(), ["so"]
    while len(scorer.encode(" ".join(words))) < tokens:
        words.append(rng.choice(WORDS))
    return scorer.decode(scorer.encode(" ".join(words))[:tokens])


@cache
def batch(searches: int, passage: int, rollouts: int) -> RolloutBatch:
    """A group: one prompt of 200 tokens, then per search 40 tokens of reasoning and query, and its passages."""
    tokenizer = small_policy().tokenizer
    question = Question("q", "Which?", (text(6, "answer"),))
    made = []
    for b in range(rollouts):
        t = Transcript(question, tokenizer.encode(text(200, "prompt")), tokenizer, PROTOCOL)
        for step in range(searches):
            ids = tokenizer.encode(f"<think>{text(25, (b, step))}</think><search>{text(10, (b, step, 1))}</search>")
            t.add_policy(ids, [-1.0] * len(ids))
            t.add_environment(
                f"\n<information>\n{text(passage, (b, step, 2))}\n</information>\n", SpanKind.DOCUMENTS, step
            )
        ids = tokenizer.encode(f"<answer>{text(6, b)}</answer>")
        t.add_policy(ids, [-1.0] * len(ids))
        made.append(t.finish("answered", "so"))
        made[-1].rewards["total"] = 0.0
    return RolloutBatch.pack(made, DEVICE)


def passages(data: RolloutBatch, rollout: int, step: int) -> slice:
    span = data.rollouts[rollout].find(SpanKind.DOCUMENTS, step)
    assert span is not None
    return slice(span.start, span.stop)


def contexts(data: RolloutBatch, gains: StepGains) -> list[tuple[int, int, list[list[int]]]]:
    """Per step: its rollout, where its passages begin, and the tokens of its contexts, the real one first."""
    probe = small_policy().encode(PROTOCOL.answer_probe)
    found = []
    for b, t, draws in zip(gains.rollout.tolist(), gains.step.tolist(), gains.draws, strict=True):
        tokens, shown = data.rollouts[b].tokens, passages(data, b, t)
        others = [data.rollouts[b2].tokens[passages(data, b2, t2)] for b2, t2 in draws]
        rows = [tokens[: shown.stop] + probe, *(tokens[: shown.start] + other + probe for other in others)]
        found.append((b, shown.start, rows))
    return found


def padded(rows: list[list[int]], width: int) -> dict[str, torch.Tensor]:
    """Rows padded on their left, with mask and positions."""
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=DEVICE)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=DEVICE)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_(min=0)}


@torch.no_grad()
def separate(
    data: RolloutBatch, gains: StepGains, scorer: PolicyScorer, *, trim: bool = False
) -> tuple[torch.Tensor, int]:
    """The first step's micro-batch of `separate`, and with `trim` the first rollout's of `trimmed`."""
    answer = scorer.encode(" " + data.rollouts[0].question.answers[0])
    groups = contexts(data, gains)
    widest = max(len(row) for _, _, rows in groups for row in rows)
    scores, forwarded = [], 0
    for rollout, _, rows in groups:
        if rollout or (scores and not trim):
            continue
        width = len(answer) + (max(map(len, rows)) if trim else widest)
        inputs = padded([row + answer for row in rows], width)
        logits = scorer.model(**inputs, use_cache=False, logits_to_keep=len(answer) + 1 if trim else 0).logits  # 0: all
        scores.append(_mean(logits, inputs["input_ids"][:, -len(answer) :]))
        forwarded += int(inputs["attention_mask"].sum()) if trim else inputs["input_ids"].numel()
    return torch.stack(scores), forwarded


@torch.no_grad()
def cached(data: RolloutBatch, gains: StepGains, scorer: PolicyScorer) -> tuple[torch.Tensor, int]:
    answer = scorer.encode(" " + data.rollouts[0].question.answers[0])
    scores, forwarded = [], 0

    def run(rows: list[list[int]], kept: DynamicCache) -> torch.Tensor:
        ids = torch.tensor(rows, device=DEVICE)
        logits = scorer.model(ids, past_key_values=kept, use_cache=True, logits_to_keep=len(answer) + 1).logits
        return _mean(logits, ids[:, -len(answer) :])

    kept, held = DynamicCache(), 0
    for rollout, fork, (real, *others) in contexts(data, gains):
        if rollout:
            continue
        scorer.model(torch.tensor([real[held:fork]], device=DEVICE), past_key_values=kept, logits_to_keep=1)
        branch = copy.deepcopy(kept)
        branch.batch_repeat_interleave(len(others))
        rows = [other[fork:] + answer for other in others]  # passages of one length need no padding
        row = real[fork:] + answer
        scores.append(torch.cat([run([row], kept), run(rows, branch)]))
        probe = len(scorer.encode(PROTOCOL.answer_probe))
        kept.crop(-(probe + len(answer)))
        forwarded += fork - held + len(row) + sum(map(len, rows))
        held = len(real) - probe
    return torch.stack(scores), forwarded


def _mean(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    logp = logits[:, -answers.shape[1] - 1 : -1].float().log_softmax(-1)
    return logp.gather(-1, answers[..., None])[..., 0].mean(1)


def old_logprobs(data: RolloutBatch, scorer: PolicyScorer) -> tuple[torch.Tensor, int]:
    """The packed pass that GRPO makes without any gain."""
    before = scorer.tokens_forwarded
    logprobs = score_tokens(data, scorer, data.policy_mask, temperature=1.0)
    return logprobs, scorer.tokens_forwarded - before


def ways(shape: str, dtype: torch.dtype) -> dict[str, tuple[Pass, int]]:
    """All ways over the same draws, in their order in a round (`ours`, the first, draws), and how often each counts."""
    size = SHAPES["counterfactual"][shape]
    scorer = policy(size["layers"], **SMOLLM2, dtype=dtype)
    data = batch(size["searches"], size["passage"], size["rollouts"])
    drawn: list[StepGains] = []

    def ours(temperature: float | None = None) -> tuple[torch.Tensor, int]:
        draws = drawn[0].draws if drawn else None
        options = {"num_random": size["random"], "pool": "batch", "draws": draws, "temperature": temperature}
        gains = score_steps(data, scorer, **options)
        drawn[:] = drawn or [gains]
        return torch.cat([gains.real[:, None], gains.counterfactual], 1), sum(gains.tokens_forwarded.values())

    return {
        "ours": (ours, 1),
        "old_logprobs": (lambda: old_logprobs(data, scorer), 1),
        "both": (partial(ours, temperature=1.0), 1),
        "separate": (lambda: separate(data, drawn[0], scorer), size["rollouts"] * size["searches"]),
        "trimmed": (lambda: separate(data, drawn[0], scorer, trim=True), size["rollouts"]),
        "cached": (lambda: cached(data, drawn[0], scorer), size["rollouts"]),
    }


def once(run: Pass, times: int, *, count_bytes: bool) -> Way:
    """Runs one way, which counts so many times."""
    result: list[tuple[torch.Tensor, int]] = []
    taken: list[float] = []

    def timed() -> None:
        taken.append(seconds(lambda: result.append(run())))

    peak = None
    if count_bytes:
        peak = peak_bytes(timed)
    else:
        timed()
    return Way(result[0][0], result[0][1] * times, taken[0] * times, peak)


def one_round(runs: dict[str, tuple[Pass, int]], tolerance: float, *, count_bytes: bool = False) -> Round:
    """Each way once; AssertionError where ours scores otherwise than a baseline."""
    found = {name: once(run, times, count_bytes=count_bytes) for name, (run, times) in runs.items()}
    for name in ("ours", "both"):  # a wrong result has no speed
        for baseline in BASELINES:
            apart = difference(found[name], found[baseline])
            assert apart < tolerance, f"{name} differs from {baseline} by {apart}"
    return found


@cache
def rounds(shape: str, dtype: torch.dtype) -> list[Round]:
    """As many as there is time for, after a warm-up; of the small shape, whose ratios say little, one. The first counts
    bytes."""
    with memory_kept():
        if shape != "small":
            one_round(ways("small", dtype), TOLERANCE[dtype])
        runs = ways(shape, dtype)
        start = time.perf_counter()
        found = [one_round(runs, TOLERANCE[dtype], count_bytes=True)]
        while shape != "small" and another_round(len(found), time.perf_counter() - start):
            found.append(one_round(runs, TOLERANCE[dtype]))
    return found


def difference(way: Way, baseline: Way) -> float:
    """Largest difference, nats per token, from what the baseline scored."""
    return float((way.scores[: len(baseline.scores)] - baseline.scores).abs().max())


def figures(found: list[Round], mode: str) -> dict[str, float | None]:
    """What a row says of these rounds."""
    first = found[0]
    mine, free = ("ours", None) if mode == "unfolded" else ("both", "old_logprobs")
    best = {name: min(one[name].seconds for one in found) for name in first}

    def cost(times: dict[str, float]) -> float:
        return times[mine] - (times[free] if free else 0.0)

    row: dict[str, float | None] = {
        "seconds": cost(best),
        "tokens": first[mine].tokens - (first[free].tokens if free else 0),
        "peak_bytes": first[mine].peak_bytes,
        "difference": max(difference(one[mine], one[name]) for one in found for name in BASELINES),
        "rounds": len(found),
    }
    for name in BASELINES:
        # Ours over the baseline's, which unlike its inverse has no pole where a round makes folding look free.
        shares = [cost({key: way.seconds for key, way in one.items()}) / one[name].seconds for one in found]
        row |= {f"{name}_seconds": best[name], f"{name}_tokens": first[name].tokens}
        row |= {f"{name}_peak_bytes": first[name].peak_bytes, f"{name}_over_ours": best[name] / cost(best)}
        row[f"{name}_median_over_ours"] = 1 / median(shares)
    return row


@pytest.mark.parametrize("mode", ["unfolded", "folded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES["counterfactual"])
def test_counterfactual(benchmark: Any, shape: str, dtype: torch.dtype, mode: str) -> None:
    found = rounds(shape, dtype)
    benchmark.pedantic(lambda: None, rounds=1)  # all was timed above; `seconds` of the figures replaces this
    benchmark.extra_info |= figures(found, mode)
