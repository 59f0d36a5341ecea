"""A batch that a script wrote, a policy with random weights, and an environment in which an engine samples as much."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import DEVICE
from stepcredit.environments import Response
from stepcredit.protocol import get_protocol
from stepcredit.rollout import Episode, Inquiry, Question, Rollout, Search, SpanKind
from stepcredit.scorer import PolicyScorer
from stepcredit.tokens import encode
from stepcredit.train.engine import Transcript
from stepcredit.train.policy import tiny_policy
from stepcredit.train.rewards import RewardWeights, assign_rewards

#: Tokens of reasoning and query of a turn.
THINK, QUERY = 25, 10
PROTOCOL = get_protocol("search_r1")
WORDS = [f"{a}{b}{c}" for a in "kstnm" for b in "aeiou" for c in "lrnsk"]


@cache
def policy(layers: int, width: int, vocabulary: int, dtype: torch.dtype) -> PolicyScorer:
    """Random weights; only token ids matter, so the tokenizer is a small one."""
    tokenizer = tiny_policy([" ".join(WORDS), "<think></think><search></search><information></information>"], 0)[1]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    return PolicyScorer(model.to(DEVICE, dtype).eval(), tokenizer, PROTOCOL)


class Script:
    """Writes a batch, and is the environment of an engine that samples as much as the script wrote."""

    protocol = PROTOCOL

    def __init__(
        self, scorer: PolicyScorer, *, prompt: int, searches: int, passage: int, groups: int, rollouts: int
    ) -> None:
        self.tokenizer, self.searches, self.size = scorer.tokenizer, searches, rollouts
        self.passages = [
            [self.text(passage, ("passage", b, step)) for step in range(searches)] for b in range(rollouts)
        ]
        self.questions = [
            Question(
                f"q{g}",
                self.text(prompt, ("prompt", g)),
                (self.text(6, ("gold", g)),),
                supporting=(f"{g} 0 0",),
                path=self.path(g, passage),
            )
            for g in range(groups)
        ]
        self.rollouts = [self.write(g, b) for g in range(groups) for b in range(rollouts)]
        assign_rewards(self.rollouts, RewardWeights(f1=1.0, multi_query=1.0, merge=1.0), scorer.tokenizer)
        for rollout in self.rollouts:  # of the single agent that `comam` credits
            rollout.rewards["local"] = rollout.rewards["gold_hit"]
        self.written = self.turn(0, 0, 0), [*self.ids("answer", 6), *encode(self.tokenizer, "</answer>")]

    def ids(self, seed: object, tokens: int) -> list[int]:
        """Words that take this many tokens."""
        rng = random.Random(repr(seed))
        words: list[int] = []
        while len(words) < tokens:
            words += encode(self.tokenizer, f" {rng.choice(WORDS)}")
        return words[:tokens]

    def text(self, tokens: int, seed: object) -> str:
        return str(self.tokenizer.decode(self.ids(seed, tokens))).strip()

    def path(self, group: int, passage: int) -> tuple[tuple[str, str], ...]:
        """How an examiner might have come to a question: a passage, then as many searches as a rollout has."""
        queries = ["", *(self.text(QUERY, ("walk", group, step)) for step in range(self.searches))]
        return tuple((query, self.text(passage, ("shown", group, step))) for step, query in enumerate(queries))

    def turn(self, group: int, rollout: int, step: int) -> list[int]:
        think, query = (self.ids((group, rollout, step, part), n) for part, n in (("think", THINK), ("query", QUERY)))
        opened, between, closed = (encode(self.tokenizer, tag) for tag in ("<think>", "</think><search>", "</search>"))
        return [*opened, *think, *between, *query, *closed]

    def response(self, group: int, rollout: int, step: int, query: str) -> Response:
        search = Search(step, query, (f"{group} {rollout % 2} {step}",))
        text = f"\n<information>\n{self.passages[rollout][step]}\n</information>\n"
        return Response(text, SpanKind.DOCUMENTS, search, forced_answer=step == self.searches - 1)

    def write(self, group: int, rollout: int) -> Rollout:
        """Searches, then a forced answer, right in every other rollout. An episode ends with each of the last two
        searches, so that `mr_search` has episodes to credit."""
        question = self.questions[group]
        t = Transcript(question, PROTOCOL.prompt(question, self.tokenizer), self.tokenizer, PROTOCOL)
        stops = []
        for step in range(self.searches):
            turn = self.turn(group, rollout, step)
            query = t.add_policy(turn, [-1.0] * len(turn)).content
            stops.append(len(t.tokens))
            t.add_response(self.response(group, rollout, step, query), room=1_000_000)
        said = self.ids(("gold", group) if rollout % 2 == 0 else ("said", group, rollout), 6)
        answer = [*said, *encode(self.tokenizer, "</answer>")]
        given = t.add_policy(answer, [-1.0] * len(answer), forced_answer=True).content
        made = t.finish("answered", given, group)
        for step in range(max(self.searches - 2, 0), self.searches):
            guess = [self.questions[group].answers[0], *WORDS[: 1 + rollout + step]]  # of another F1 each
            made.episodes.append(Episode(stops[step], step + 1, " ".join(guess)))
        made.episodes.append(Episode(len(made.tokens), self.searches, given))
        made.validate()
        return made

    def respond(
        self,
        turns: Sequence[Any],
        searches: Sequence[Sequence[Search]],
        _: object,
        forced: Sequence[bool],
        **__: object,
    ) -> list[Response]:
        """To an engine: passages, whatever the policy wrote, and after the last search the answer is forced."""
        return [
            Response(done=True) if was_forced else self.response(0, b % self.size, len(done), "")
            for b, (_turn, done, was_forced) in enumerate(zip(turns, searches, forced, strict=True))
        ]


def as_dialogue(rollout: Rollout) -> Rollout:
    """The same tokens as a dialogue: queries are questions to a user, and passages replies, each of which leaves half
    of the regions that could be meant."""
    kinds = {SpanKind.QUERY: SpanKind.ASK, SpanKind.DOCUMENTS: SpanKind.REPLY}
    spans = [replace(span, kind=kinds.get(span.kind, span.kind)) for span in rollout.spans]
    left = [tuple(range(1 << n)) for n in range(len(rollout.searches), -1, -1)]
    inquiries = [
        Inquiry(search.step, search.query, (), before=len(before), remaining=after)
        for search, before, after in zip(rollout.searches, left, left[1:], strict=False)
    ]
    return replace(rollout, spans=spans, searches=inquiries)


@contextmanager
def words_only(scorer: PolicyScorer) -> Iterator[None]:
    """Nothing that ends a turn is sampled, so that turns are as long as they may be."""
    tokenizer = scorer.tokenizer
    ends = {i for token, i in tokenizer.get_vocab().items() if ">" in token}
    kept = sorted(set(tokenizer.get_vocab().values()) - ends - {tokenizer.eos_token_id})
    size = cast(torch.nn.Embedding, scorer.model.get_output_embeddings()).weight.shape[0]
    bias = torch.full((size,), -torch.inf, device=DEVICE)
    bias[kept] = 0.0

    def limit(_: object, __: object, output: Any) -> Any:
        output.logits = output.logits + bias
        return output

    hook = scorer.model.register_forward_hook(limit)
    try:
        yield
    finally:
        hook.remove()
