"""Counterfactual scoring: what each search step's passages did for the gold answer, all branches in one packed pass.

Per question one tree. Its trunks are the rollouts, merged as far as they agree; at each scored step fork a *real* leaf
(the answer probe and the gold answer where the step ends) and *counterfactual* leaves (other passages, or none, then
the same). Every leaf sees what a separate forward pass over its context would.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch

from stepcredit.batch import RolloutBatch
from stepcredit.branches.audit import audit
from stepcredit.branches.contexts import REASONS, Branches, TrunkMode, plan_step, read_trunk
from stepcredit.branches.draws import Pool, StepId, draw_passages
from stepcredit.branches.forest import Forest, plant
from stepcredit.branches.policy_tokens import place_logprobs, runs_of
from stepcredit.ops import _checks as check
from stepcredit.ops import information_gain
from stepcredit.protocol import Protocol
from stepcredit.reference import InformationGain
from stepcredit.rollout import SpanKind
from stepcredit.scorer import PolicyScorer

OP = "score_steps"

Baseline = Literal["random", "empty", "previous"]


@dataclass(frozen=True, slots=True)
class StepGains:
    """Information gain of the S search steps of a batch. Scores are nats per (weighted) answer token.

    Attributes:
        rollout: int64 [S], the rollout of each step.
        step: int64 [S], its number inside the rollout.
        gain: float32 [S], real minus baseline; NaN where unscored.
        real: float32 [S], score of the best gold answer under the step's own passages; NaN where unscored.
        baseline: float32 [S], mean of that answer's counterfactual scores; NaN where unscored.
        scored: bool [S].
        counterfactual: float32 [S, N], that answer's counterfactual scores; NaN where there is none.
        scores: float32 [S, K, 1 + N], of each of up to K gold answers the score under the step's own passages, then its
            counterfactual ones; NaN where there is none.
        draws: for each step, the (rollout, step) whose passages stand in; empty unless baseline="random".
        reasons: for each step, why it is unscored, one of `branches.contexts.REASONS`; None where it is scored.
        counts: "steps", "scored", "truncated" (steps whose contexts were cut on their left), "no_query" (passages
            with the number of a search whose query has no tokens: no step, neither scored nor drawn), "empty_answers"
            (gold answers of steps, left out because they have no tokens), "pool_size" (steps whose passages can be
            drawn), "pool_fallback", "pool_repeated", and why steps are unscored:
            "unscored_no_documents", "unscored_short_documents", "unscored_empty_pool", "unscored_no_answer" (no gold
            answer has a token), "unscored_too_long", "unscored_no_weight" (no token of the best answer has a weight).
        tokens_forwarded: tokens run through the model: "trunk", "real" leaves, "counterfactual" leaves.
        seconds: wall time of the scoring.
        logprobs: float32 [T] when asked for: log-probs of the policy's tokens, 0 where the environment wrote.
        difference: with `verify`, the largest difference to separate forwards, nats per answer token; None where no
            step was scored.
    """

    rollout: torch.Tensor
    step: torch.Tensor
    gain: torch.Tensor
    real: torch.Tensor
    baseline: torch.Tensor
    scored: torch.Tensor
    counterfactual: torch.Tensor
    scores: torch.Tensor
    draws: tuple[tuple[StepId, ...], ...]
    reasons: tuple[str | None, ...]
    counts: dict[str, int]
    tokens_forwarded: dict[str, int]
    seconds: float
    logprobs: torch.Tensor | None = None
    difference: float | None = None


def score_steps(
    batch: RolloutBatch,
    policy: PolicyScorer,
    *,
    num_random: int = 3,
    trunk: TrunkMode = "rollout",
    baseline: Baseline = "random",
    pool: Pool = "other_questions",
    refinements: bool = True,
    head_tokens: int = 0,
    head_weight: float = 1.0,
    max_variants: int = 1,
    answer_probe: str | None = None,
    seed: int = 0,
    step: int = 0,
    max_tokens: int = 16384,
    max_context: int | None = None,
    draws: Sequence[Sequence[StepId]] | None = None,
    temperature: float | None = None,
    verify: bool = False,
) -> StepGains:
    """Information gain of every search step of a batch about the gold answer of its question.

    For step t, with the context up to t's query fixed::

        gain = score(gold | real passages) - mean over counterfactuals of score(gold | other passages)

    where the passages and the policy's refinement of them are swapped together. Deterministic given `seed` and `step`.

    Args:
        batch: packed rollouts; the gold answers are those of their questions.
        policy: the policy that made them.
        num_random: counterfactuals per step (IG-Search: 3); `baseline="random"` only.
        trunk: "rollout": contexts are the rollout as generated. "skeleton": reasoning between steps is left out, as in
            IG-Search's released code (`branches.contexts.read_trunk`).
        baseline: "random": passages of other steps. "empty": none. "previous": the context where the step before ended,
            for the first step the prompt (IGPO).
        pool: "other_questions" (IG-Search's text) or "batch" (its released code).
        refinements: a step ends after the policy's refinement of its passages, where the protocol has one (IG-Search);
            False: after the passages, the refinement being part of the next turn.
        head_tokens, head_weight: weights of the first answer tokens, see `information_gain`.
        max_variants: gold answers scored per step; the best real score wins.
        answer_probe: what precedes the gold answer; None: the protocol's. Probe and answer are tokenised separately; an
            answer after a probe that does not end in a space starts with one.
        seed, step: of the run, and the training step; they seed the draws.
        max_tokens: tokens per forward pass. A question with more gets several, and in the end one for each step, which
            alone may have more.
        max_context: when the longest context of a step, answer included, has more tokens (or more than the policy can
            score exactly), all contexts of the step lose the same number on their left (the released code cuts each to
            4096 by itself, so that they no longer share a prefix). The step is unscored when nothing of the rollout
            would be left.
        draws: replay these instead of drawing, one sequence per step of the batch, as in `StepGains.draws`.
        temperature: also return the log-probs of all policy tokens, at this temperature, from the same pass;
            `trunk="rollout"` only.
        verify: score a sample of the steps again by separate forwards.

    Returns:
        StepGains.

    Raises:
        ValueError: an option is out of range, `draws` does not fit the batch, a token id is not in the vocabulary, with
            `temperature` a rollout is longer than what the policy can score exactly (`PolicyScorer.max_context`), or
            what `check_contexts` refuses.
        FloatingPointError: the policy's hidden states are not finite; names the question.
        RuntimeError: with `verify`, a step's scores differ from separate forwards by more than rounding.

    Source: IG-Search (arXiv 2604.15148), equation 2, and its released `ig_reward.py`.
    """
    started = time.perf_counter()
    rollouts = batch.rollouts
    steps: list[StepId] = list(zip(batch.step_rollout.tolist(), batch.step_index.tolist(), strict=True))
    at_least_1 = dict(num_random=num_random, max_variants=max_variants, max_tokens=max_tokens, max_context=max_context)
    _check(steps, trunk, baseline, pool, draws, temperature, at_least_1)
    check.in_range(OP, "head_tokens", head_tokens, 0, 2**31)
    check.in_range(OP, "head_weight", head_weight, 0.0, 1e6)
    check_contexts(policy.protocol, trunk, baseline)

    trunks = [read_trunk(rollout, policy, trunk, refinements=refinements) for rollout in rollouts]
    found = {(b, t): site for b, one in enumerate(trunks) for t, site in one.steps.items()}
    counts: Counter[str] = Counter({"steps": len(steps), "truncated": 0, "empty_answers": 0})
    counts["no_query"] = sum(
        span.kind is SpanKind.DOCUMENTS and span.step >= 0 and rollout.find(SpanKind.QUERY, span.step) is None
        for rollout in rollouts
        for span in rollout.spans
    )
    counts.update({f"unscored_{reason}": 0 for reason in REASONS})
    drawn: dict[StepId, tuple[StepId, ...]] = {}
    if baseline == "random":
        usable = {key: site.passages for key, site in found.items() if site.fault is None}
        counts["pool_size"] = len(usable)
        if draws is None:
            before = {(b, t): tuple(trunks[b].tokens[: found[b, t].documents]) for b, t in usable}
            drawn, pool_counts = draw_passages(
                rollouts, before, usable, num_random=num_random, pool=pool, seed=seed, step=step
            )
            counts.update(pool_counts)
        else:
            drawn = {key: tuple((b, t) for b, t in given) for key, given in zip(steps, draws, strict=True)}
            if unknown := sorted({other for given in drawn.values() for other in given} - set(found)):
                raise ValueError(f"draws names {unknown[0]}, which is no search step with passages of this batch")

    limits = [limit for limit in (max_context, policy.max_context) if limit is not None]
    opening = policy.protocol.answer_probe if answer_probe is None else answer_probe
    probe = policy.encode(opening)
    # Byte-level vocabularies hold " Paris" as a word and "Paris" as an odd one; policies write the former.
    space = "" if opening[-1:].isspace() else " "
    branches: dict[StepId, Branches] = {}
    reasons: dict[StepId, str] = {}
    for key in steps:
        given = [policy.encode(space + text) for text in rollouts[key[0]].question.answers]
        answers = [ids for ids in given if ids][:max_variants]
        counts["empty_answers"] += sum(not ids for ids in given)
        others = [found[other].passages for other in drawn.get(key, ())]
        planned = plan_step(found.get(key), others, answers, probe, baseline, min(limits, default=None))
        if isinstance(planned, str):
            reasons[key] = planned
        else:
            branches[key] = planned
            counts["truncated"] += planned.cut > 0

    runs = {} if temperature is None else runs_of(batch, batch.policy_mask)
    forest = plant(rollouts, trunks, branches, runs=runs, temperature=temperature or 1.0, max_tokens=max_tokens)
    logprobs = policy.logprobs(forest.trees, max_tokens=max_tokens).to(batch.tokens.device)
    gain, counterfactual, scores = _gains(steps, forest, logprobs, head_tokens, head_weight)
    for key, scored in zip(steps, gain.scored.tolist(), strict=True):
        if not scored:
            reasons.setdefault(key, "no_weight")
    counts.update(f"unscored_{reason}" for reason in reasons.values())
    counts["scored"] = len(steps) - len(reasons)
    return StepGains(
        rollout=batch.step_rollout,
        step=batch.step_index,
        gain=gain.gain,
        real=gain.real,
        baseline=gain.baseline,
        scored=gain.scored,
        counterfactual=counterfactual,
        scores=scores,
        draws=tuple(drawn.get(key, ()) for key in steps),
        reasons=tuple(reasons.get(key) for key in steps),
        counts=dict(counts),
        tokens_forwarded=dict(forest.tokens),
        seconds=time.perf_counter() - started,
        logprobs=None if temperature is None else place_logprobs(batch, forest, runs, logprobs),
        difference=audit(policy, rollouts, trunks, branches, forest, logprobs, seed) if verify else None,
    )


def check_contexts(protocol: Protocol, trunk: str, baseline: str) -> None:
    """ValueError when such contexts cannot be cut from rollouts of this grammar: without the text between steps, or
    without a message, they would lose the turns of the chat template too."""
    check.require(
        protocol.tagged or (trunk == "rollout" and baseline != "empty"),
        f"{OP}: trunk={trunk!r} with baseline={baseline!r} needs messages that stand between tags, which those of the "
        f"protocol {protocol.name!r} do not; use trunk='rollout' with baseline='random' or 'previous'",
    )


def _check(
    steps: Sequence[StepId],
    trunk: str,
    baseline: str,
    pool: str,
    draws: Sequence[Sequence[StepId]] | None,
    temperature: float | None,
    at_least_1: Mapping[str, int | None],
) -> None:
    for name, value, allowed in (
        ("trunk", trunk, get_args(TrunkMode)),
        ("baseline", baseline, get_args(Baseline)),
        ("pool", pool, get_args(Pool)),
    ):
        check.choice(OP, name, value, allowed)
    for name, number in at_least_1.items():
        check.require(number is None or number >= 1, f"{OP}: {name} must be at least 1, got {number!r}")
    if draws is not None:
        check.require(baseline == "random", f"{OP}: draws needs baseline='random', got {baseline!r}")
        check.require(len(draws) == len(steps), f"{OP}: draws has {len(draws)} entries for {len(steps)} steps")
    check.require(
        temperature is None or trunk == "rollout",
        f"{OP}: temperature (log-probs of the policy's tokens) needs trunk='rollout', got {trunk!r}",
    )
    check.require(temperature is None or temperature > 0, f"{OP}: temperature must be positive, got {temperature!r}")


def _gains(
    steps: Sequence[StepId],
    forest: Forest,
    logprobs: torch.Tensor,
    head_tokens: int,
    head_weight: float,
) -> tuple[InformationGain, torch.Tensor, torch.Tensor]:
    """`information_gain` of every step, its best answer's counterfactual scores [S, N], and all [S, K, 1 + N]."""
    places: list[np.ndarray] = [np.zeros(0, np.int64)]
    cu_branches, cu_variants, cu_steps = [0], [0], [0]
    for key in steps:
        contexts = forest.steps.get(key, [])
        for variant in zip(*contexts, strict=True):  # the real context's first
            for start, stop in variant:
                places.append(np.arange(start, stop))
                cu_branches.append(cu_branches[-1] + stop - start)
            cu_variants.append(len(cu_branches) - 1)
        cu_steps.append(len(cu_variants) - 1)

    def put(values: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, np.int64), device=logprobs.device)

    gain = information_gain(
        logprobs[put(np.concatenate(places))],
        put(cu_branches),
        put(cu_variants),
        put(cu_steps),
        head_tokens=head_tokens,
        head_weight=head_weight,
    )
    width = max((len(contexts) for contexts in forest.steps.values()), default=1)
    answers = max((len(contexts[0]) for contexts in forest.steps.values()), default=0)
    table = np.full((len(steps), answers, width), np.nan, np.float32)
    best_rows = np.full((len(steps), width - 1), np.nan, np.float32)
    scores = gain.scores.cpu().numpy()
    for s, best in enumerate(gain.best_variant.tolist()):
        for k, (first, last) in enumerate(pairwise(cu_variants[cu_steps[s] : cu_steps[s + 1] + 1])):
            table[s, k, : last - first] = scores[first:last]
        if best >= 0:
            best_rows[s] = table[s, best - cu_steps[s], 1:]
    return gain, torch.from_numpy(best_rows).to(logprobs.device), torch.from_numpy(table).to(logprobs.device)
