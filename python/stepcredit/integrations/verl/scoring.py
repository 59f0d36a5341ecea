"""Scoring with a policy that lives in verl's workers: the method that they get, and the scorer that calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker

from stepcredit.branches.packing import TokenTree
from stepcredit.protocol import Protocol
from stepcredit.scorer import PolicyScorer


class ScoringWorker(ActorRolloutRefWorker):
    """verl's worker with the actor, the rollout and the reference, which also scores token trees with the actor.

    All ranks are called at once, whatever share each has: where the actor is sharded, every rank takes part in every
    forward pass of the others (`PolicyScorer`).
    """

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def describe_policy(self) -> dict[str, Any]:
        """What a `WorkerGroupScorer` has to know of the actor.

        Raises:
            ValueError: token trees cannot be scored exactly with it; the message says why.
        """
        with self.actor.engine.eval_mode():
            scorer = self._scorer()
            return {"name": scorer.name, "device": str(scorer.device), "max_context": scorer.max_context}

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def score_trees(self, trees: Sequence[TokenTree], max_tokens: int) -> dict[str, Any]:
        """`PolicyScorer.logprobs` of this rank's share: {"logprobs": float32 on the CPU, "dtype", "tokens"}."""
        with self.actor.engine.eval_mode():
            scorer = self._scorer()
            logprobs = scorer.logprobs(trees, max_tokens=max_tokens).cpu()
        return {"logprobs": logprobs, "dtype": scorer.compute_dtype, "tokens": scorer.tokens_forwarded}

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def score_contexts(self, contexts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[torch.Tensor]:
        """`PolicyScorer.separate_logprobs` of this rank's share, on the CPU."""
        with self.actor.engine.eval_mode():
            return [logprobs.cpu() for logprobs in self._scorer().separate_logprobs(contexts)]

    def _scorer(self) -> PolicyScorer:
        # Trees are tokens already: neither the tokenizer nor the protocol is asked.
        return PolicyScorer(self.actor.engine.module, self.actor.model_config.tokenizer, "search_r1")


class WorkerGroupScorer(PolicyScorer):
    """A `PolicyScorer` whose policy lives in a worker group of `ScoringWorker`s. What it gives does not depend on how
    many workers there are, beyond rounding.

    Args:
        workers: the worker group.
        tokenizer: the policy's.
        protocol: tag grammar of its rollouts.
    """

    def __init__(self, workers: Any, tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> None:
        # There is no model here for the checks of the class above; workers make them.
        self._workers = workers
        self.tokenizer = tokenizer
        self.protocol = protocol
        self.tokens_forwarded = 0
        self.compute_dtype = torch.float32
        facts = workers.describe_policy()[0]
        self.name = facts["name"]
        self._device = torch.device(facts["device"])
        self._max_context: int | None = facts["max_context"]

    @property
    def device(self) -> torch.device:
        """Where the policy computes; log-probs are given on the CPU."""
        return self._device

    @property
    def max_context(self) -> int | None:
        """As in `PolicyScorer`."""
        return self._max_context

    def logprobs(self, trees: Sequence[TokenTree], *, max_tokens: int = 16384) -> torch.Tensor:
        """As in `PolicyScorer`, on the CPU. The trees are shared out over all workers, about as many tokens to each."""
        shares = share_out([tree.num_tokens for tree in trees], self._workers.world_size)
        results = self._workers.score_trees(
            [[trees[i] for i in share] for share in shares], [max_tokens] * self._workers.world_size
        )
        parts: list[torch.Tensor] = [torch.zeros(0)] * len(trees)
        for share, result in zip(shares, results, strict=True):
            counts = [sum(len(read.targets) for read in trees[i].reads) for i in share]
            for i, part in zip(share, result["logprobs"].split(counts), strict=True):
                parts[i] = part
            self.tokens_forwarded += result["tokens"]
        self.compute_dtype = results[0]["dtype"]
        return torch.cat(parts) if parts else torch.zeros(0)

    def separate_logprobs(self, contexts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[torch.Tensor]:
        """As in `PolicyScorer`, on the CPU."""
        shares = share_out([len(context) + len(answer) for context, answer in contexts], self._workers.world_size)
        results = self._workers.score_contexts([[contexts[i] for i in share] for share in shares])
        found: dict[int, torch.Tensor] = {}
        for share, result in zip(shares, results, strict=True):
            found.update(zip(share, result, strict=True))
        return [found[i] for i in range(len(contexts))]


def share_out(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of `sizes` for each rank, their sums about equal: the largest first, each to the rank with the least."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += sizes[i]
    return shares
