"""Rollouts that search, in verl's agent loop: the policy's turns from verl's rollout servers, the answers from ours."""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register
from verl.utils.profiler import simple_timer
from verl.utils.rollout_trace import rollout_trace_op

from stepcredit.environments import Response, SearchEnvironment
from stepcredit.integrations._rows import question_of
from stepcredit.integrations.verl.advantage import StepRewardOutput
from stepcredit.integrations.verl.options import Options, read_options
from stepcredit.protocol import Protocol, get_protocol
from stepcredit.rollout import Question, Rollout, Search, SpanKind
from stepcredit.tokens import decode
from stepcredit.train.engine.transcript import Transcript
from stepcredit.turn import Turn

#: Closing tags as policies spell them as a rule; servers stop there. Others are found by `Protocol.closes`.
_STOPS = ("</search>", "</answer>")


@register("stepcredit_search")
class SearchAgentLoop(AgentLoopBase):
    """Search rollouts over `SearchEnvironment`, in token space: what was sampled is never tokenised again.

    Its fields of the configuration are those of `Options`. Besides what verl asks for, the output's `extra_fields` hold
    "policy_mask" (for each response token, whether the policy wrote it), "passage_ids" (of each search) and "counts"
    (what went wrong and how often, as in `Rollout.counts`; "cut_tokens" are tokens sampled after a closed tag, which
    are dropped).

    The response is never longer than `rollout.response_length`, and always ends with a token of the policy: a reply for
    which there is no room is not appended.
    """

    @rollout_trace_op
    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **row: Any) -> AgentLoopOutput:
        """One rollout of a row of the data.

        Raises:
            RuntimeError: whatever failed, naming the rollout.
        """
        question: Question | None = None
        try:
            prompt_ids = await self.ct_build_initial_tokens(list(row["raw_prompt"]))
            question = question_of(row, prompt_ids)
            return await self._rollout(question, prompt_ids, sampling_params, int(priority))
        except Exception as error:
            name = f"rollout {row.get('uid')}_{row.get('session_id')}" + (f" of {question.id!r}" if question else "")
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error

    async def reward_steps(self, rollout: Rollout) -> Sequence[float]:
        """What each search with query tokens is worth (`Rollout.steps`), in units of advantage; () for nothing, which
        is what this class says.

        For subclasses that know it, to be used with `algorithm.adv_estimator=grpo_steps`: the reward of a search is
        shared out over the tokens of its query.
        """
        return ()

    async def _rollout(
        self, question: Question, prompt_ids: list[int], sampling_params: dict[str, Any], priority: int
    ) -> AgentLoopOutput:
        options = read_options(self.config)
        protocol = get_protocol(options.protocol)
        desk = _desk(options, self.loop)
        transcript = Transcript(question, prompt_ids, self.tokenizer, protocol)
        limit = len(prompt_ids) + self.rollout_config.response_length
        stops = {"stop": list(_STOPS)} if self._finds_stops() else {}
        request_id = f"det-{priority}" if self.rollout_config.get("full_determinism", False) else uuid4().hex
        metrics: dict[str, Any] = {"num_preempted": -1}
        extra: dict[str, Any] = {"turn_scores": [], "tool_rewards": []}
        answer, faults, forced, turns, replies, known = None, 0, False, 0, 0, True
        while (room := limit - len(transcript.tokens)) > 0:
            with simple_timer("generate_sequences", metrics):
                output = await self.server_manager.generate(
                    request_id=request_id,
                    prompt_ids=list(transcript.tokens),
                    sampling_params={**sampling_params, **stops, "max_tokens": room},
                    priority=priority,
                )
            _note_server(output, extra, metrics)
            sampled = list(output.token_ids)[:room]
            if not sampled:
                raise RuntimeError(f"the rollout server returned no token (stop_reason {output.stop_reason!r})")
            ids = sampled[: self._turn_length(sampled, protocol, forced)]
            if len(ids) < len(sampled):
                transcript.counts["cut_tokens"] += len(sampled) - len(ids)
            known = known and bool(output.log_probs)
            logprobs = list(output.log_probs)[: len(ids)] if known else [0.0] * len(ids)
            turn = transcript.add_policy(ids, logprobs, forced)
            turns += 1
            answer = turn.content if turn.action == "answer" else None
            if len(transcript.tokens) >= limit:
                break
            with simple_timer("tool_calls", metrics):
                response = await desk.respond(turn, tuple(transcript.searches), faults, forced)
            faults += response.fault
            forced = response.forced_answer
            fed = transcript.add_response(response, limit - len(transcript.tokens))
            if response.done or fed is None:
                break
            replies += 1

        rollout = transcript.finish("unclosed" if answer is None else "answered", answer)
        mask = [int(span.by_policy) for span in rollout.spans[1:] for _ in range(span.start, span.stop)]
        response_logprobs = [0.0 if math.isnan(value) else value for value in rollout.logprobs[len(prompt_ids) :]]
        extra |= {
            "policy_mask": mask,
            "passage_ids": [list(search.passage_ids) for search in rollout.searches],
            "counts": dict(rollout.counts),
        }
        fields = {
            "prompt_ids": prompt_ids,
            "response_ids": rollout.tokens[len(prompt_ids) :],
            "response_mask": mask,
            "response_logprobs": response_logprobs if known else None,
            "routed_experts": None if output.routed_experts is None else output.routed_experts[: len(rollout.tokens)],
            "num_turns": turns + replies + 1,
            "metrics": metrics,
            "extra_fields": extra,
        }
        rewards = list(await self.reward_steps(rollout))
        if not rewards:
            return AgentLoopOutput(**fields)
        return StepRewardOutput(**fields, token_rewards=_per_token(rollout, rewards))

    def _finds_stops(self) -> bool:
        """Whether the server can look for strings: SGLang without a tokenizer cannot."""
        return self.rollout_config.name == "vllm" or not self.rollout_config.get("skip_tokenizer_init", True)

    def _turn_length(self, ids: list[int], protocol: Protocol, forced: bool) -> int:
        """How many of these tokens are the turn: up to the one that closes its first tag."""

        def closed(count: int) -> bool:
            return protocol.closes(decode(self.tokenizer, ids[:count]), forced)

        return bisect_left(range(1, len(ids)), True, key=closed) + 1 if closed(len(ids)) else len(ids)


class _Desk:
    """Answers the turns of many rollouts: those that came while the retriever was busy are its next call, together."""

    def __init__(self, environment: SearchEnvironment) -> None:
        self._environment = environment
        self._waiting: list[tuple[tuple[Any, ...], asyncio.Future[Response]]] = []
        self._lock = asyncio.Lock()

    async def respond(self, turn: Turn, searches: tuple[Search, ...], faults: int, forced: bool) -> Response:
        """The environment's reply to one turn."""
        reply: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._waiting.append(((turn, searches, faults, forced), reply))
        async with self._lock:
            if not reply.done():
                await self._answer_all()
        return await reply

    async def _answer_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        columns = zip(*(asked for asked, _ in waiting), strict=True)
        try:
            responses = await asyncio.to_thread(self._environment.respond, *columns)
        except BaseException as error:  # a cancelled rollout must not leave the others waiting
            for _, reply in waiting:
                if not reply.done():
                    reply.set_exception(error)
            return
        for (_, reply), response in zip(waiting, responses, strict=True):
            if not reply.done():
                reply.set_result(response)


@cache
def _desk(options: Options, loop: asyncio.AbstractEventLoop) -> _Desk:
    return _Desk(options.make_environment())


def _note_server(output: Any, extra: dict[str, Any], metrics: dict[str, Any]) -> None:
    """What verl wants to know of each call: versions of the weights, and preemptions."""
    first = "min_global_steps" not in extra
    steps = {name: output.extra_fields.get(name) for name in ("min_global_steps", "max_global_steps")}
    extra |= steps if first else {"max_global_steps": steps["max_global_steps"]}
    if output.num_preempted is not None:
        metrics["num_preempted"] = max(metrics["num_preempted"], 0) + output.num_preempted


def _per_token(rollout: Rollout, rewards: Sequence[float]) -> list[float]:
    """Rewards of steps, each shared out over the tokens of its query."""
    steps = rollout.steps()
    if len(rewards) != len(steps):
        raise ValueError(f"reward_steps gave {len(rewards)} rewards for {len(steps)} searches with query tokens")
    out = [0.0] * len(rollout.tokens)
    for step, reward in zip(steps, rewards, strict=True):
        at = [
            i
            for span in rollout.spans
            if span.kind is SpanKind.QUERY and span.step == step
            for i in range(span.start, span.stop)
        ]
        for i in at:
            out[i] = float(reward) / len(at)
    return out[rollout.prompt_length :]
