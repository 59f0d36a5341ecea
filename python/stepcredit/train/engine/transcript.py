"""Token-space transcripts: spans come from the tokens that were generated or fed, never from re-tokenised text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from stepcredit.environments import Response
from stepcredit.protocol import Protocol
from stepcredit.rollout import Episode, Question, Rollout, Search, Span, SpanKind
from stepcredit.tokens import boundaries, decode, encode
from stepcredit.turn import Piece, Turn

# Who owns a token that carries visible characters of several kinds; tags own it only when nothing else does.
_PRIORITY = {
    SpanKind.QUERY: 3,
    SpanKind.ASK: 3,
    SpanKind.ANSWER: 2,
    SpanKind.REFINE: 1,
    SpanKind.MERGE: 1,
    SpanKind.THINK: 0,
    SpanKind.TAG: -1,
}

_INQUIRIES = (SpanKind.QUERY, SpanKind.ASK)
_FOUND = (SpanKind.DOCUMENTS, SpanKind.REPLY)


def token_kinds(text: str, offsets: Sequence[int], pieces: Sequence[Piece]) -> list[SpanKind]:
    """The kind of each token, from the kinds of the characters it carries.

    A token inside one piece has that piece's kind. One that straddles pieces belongs to the content whose visible
    characters it carries (QUERY first), and to TAG when it carries none. A token without characters has the kind of
    the character that follows it.
    """
    kinds = []
    for start, stop in pairwise(offsets):
        stop = max(stop, start + 1)
        touched = [p for p in pieces if p.start < stop and start < p.stop]
        if not touched:  # after the last character
            touched = list(pieces[-1:]) or [Piece(SpanKind.THINK, 0, 0)]
        visible = [p for p in touched if text[max(start, p.start) : min(stop, p.stop)].strip()]
        kinds.append(max(visible or touched, key=lambda p: _PRIORITY[p.kind]).kind)
    return kinds


class Transcript:
    """Builds one `Rollout` from what was fed and sampled, in order.

    Used by the engines and by scripted demonstrations alike, so that both have spans from the same code.

    Args:
        question: what is asked.
        prompt_ids: token ids of the prompt, at least one.
        tokenizer: decodes turns and encodes environment messages.
        protocol: the tag grammar.
    """

    def __init__(
        self,
        question: Question,
        prompt_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        protocol: Protocol,
    ) -> None:
        if not prompt_ids:
            raise ValueError(f"question {question.id!r}: prompt_ids is empty")
        self.question = question
        self.tokenizer = tokenizer
        self.protocol = protocol
        self.tokens = list(prompt_ids)
        self.logprobs = [float("nan")] * len(self.tokens)
        self.spans = [Span(SpanKind.PROMPT, 0, len(self.tokens))]
        self.searches: list[Search] = []
        self.counts: Counter[str] = Counter()
        self.rewards: dict[str, float] = {}
        self.episodes: list[Episode] = []  # those that are over
        self._prompt_length = len(self.tokens)
        self._next_step = 0

    def add_policy(self, token_ids: Sequence[int], logprobs: Sequence[float], forced_answer: bool = False) -> Turn:
        """Append one turn of the policy and return it parsed.

        A query, or a question to a user, gets the number of the search it asks for as `step`; REFINE and MERGE text
        belongs to the last search.

        Args:
            token_ids: the sampled tokens of the turn.
            logprobs: one finite log-prob per token (nats).
            forced_answer: the environment opened the answer just before.
        """
        if len(token_ids) != len(logprobs):
            raise ValueError(f"logprobs has {len(logprobs)} entries for {len(token_ids)} token_ids")
        text = decode(self.tokenizer, token_ids)
        turn = self.protocol.parse_turn(text, forced_answer)
        kinds = token_kinds(text, boundaries(self.tokenizer, token_ids, text), turn.pieces)
        last = self._next_step - 1
        steps = {**dict.fromkeys(_INQUIRIES, self._next_step), SpanKind.REFINE: last, SpanKind.MERGE: last}
        for kind in kinds:
            self._extend(kind, 1, steps.get(kind, -1))
        self.tokens.extend(token_ids)
        self.logprobs.extend(logprobs)
        if turn.forged_tags:
            self.counts["forged_tags"] += turn.forged_tags
        return turn

    def add_environment(self, text: str, kind: SpanKind, step: int = -1) -> list[int]:
        """Append a message of the environment, encoded once on its own, and return its token ids.

        Strings that look like special tokens stay text: retrieved passages must not smuggle in control tokens.
        """
        ids = encode(self.tokenizer, text)
        self._next_step = max(self._next_step, step + 1)
        self._append(ids, kind, step)
        return ids

    def add_environment_tokens(self, token_ids: Sequence[int], kind: SpanKind, search: Search | None = None) -> None:
        """Append a message of the environment as it was fed, with the search that it answers."""
        if search is not None:
            self.searches.append(search)
            self._next_step = search.step + 1
        self._append(list(token_ids), kind, search.step if search and kind in _FOUND else -1)

    def add_response(self, response: Response, room: int) -> list[int] | None:
        """Append an environment's reply: its message, the executed search, the episode that an answer ended, a forced
        answer opener, its counts and measures.

        Args:
            response: the reply.
            room: tokens that still fit the context.

        Returns:
            The token ids to feed; None when the reply would leave no room for a token of the policy, in which case
            only the episode, the counts and the measures are kept.
        """
        self.counts.update(response.counts)
        self.rewards.update(response.rewards)
        if response.answer is not None:
            self.episodes.append(Episode(len(self.tokens), len(self.searches), response.answer))
        message = encode(self.tokenizer, response.text)
        opener = encode(self.tokenizer, self.protocol.answer_opener) if response.forced_answer else []
        if len(message) + len(opener) >= room:
            return None
        self.add_environment_tokens(message, response.kind, response.search)
        self._append(opener, SpanKind.NOTICE, -1)
        return message + opener

    def finish(self, reason: str, answer: str | None, group: int = 0) -> Rollout:
        """The finished rollout. `reason` becomes its `finish`, `answer` its answer; where there is None, as the last
        episode ended without one, the answer of the episode before is. A query that no search answered (none was left,
        or its passages did not fit the context) loses its step: there is nothing to credit."""
        episodes = list(self.episodes)
        if episodes and episodes[-1].stop < len(self.tokens):
            episodes.append(Episode(len(self.tokens), len(self.searches), answer))
        if answer is None and self.episodes:
            answer = self.episodes[-1].answer
        spans = [s if s.kind not in _INQUIRIES or s.step < self._next_step else replace(s, step=-1) for s in self.spans]
        return Rollout(
            question=self.question,
            tokens=self.tokens,
            prompt_length=self._prompt_length,
            spans=spans,
            logprobs=self.logprobs,
            group=group,
            finish=reason,
            answer=answer,
            searches=self.searches,
            rewards=dict(self.rewards),
            counts=dict(self.counts),
            episodes=episodes,
        )

    def _append(self, ids: list[int], kind: SpanKind, step: int) -> None:
        self._extend(kind, len(ids), step)
        self.tokens.extend(ids)
        self.logprobs.extend([float("nan")] * len(ids))

    def _extend(self, kind: SpanKind, length: int, step: int) -> None:
        last = self.spans[-1]
        if last.kind is kind and last.step == step and kind is not SpanKind.PROMPT:
            self.spans[-1] = Span(kind, last.start, last.stop + length, step)
        elif length:
            self.spans.append(Span(kind, last.stop, last.stop + length, step))
