"""What happened, token by token: `Span`s, and the `Rollout` that they make up.

Token ids are the ones that were generated or fed; nothing here, and nothing downstream, re-tokenises text.
Who wrote a token follows from the kind of the span it lies in (`ENVIRONMENT_KINDS`), so there is no second
mask to keep in step with the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise


class SpanKind(str, Enum):
    """The kind of a run of tokens. Tags written by the policy are TAG; tags written by the environment belong
    to the environment span they wrap."""

    PROMPT = "prompt"
    THINK = "think"
    QUERY = "query"
    DOCUMENTS = "documents"
    REFINE = "refine"
    MERGE = "merge"
    ASK = "ask"
    REPLY = "reply"
    MEMORY = "memory"
    ANSWER = "answer"
    TAG = "tag"
    NOTICE = "notice"


#: Kinds whose tokens the environment wrote. They carry no gradient and receive no credit.
ENVIRONMENT_KINDS = frozenset({SpanKind.PROMPT, SpanKind.DOCUMENTS, SpanKind.REPLY, SpanKind.MEMORY, SpanKind.NOTICE})


#: A search of more queries than this is one of several (MultiSearch, arXiv 2605.13534).
MULTI_QUERIES = 2


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `[start, stop)` of one rollout. `step` counts searches from 0; -1 outside any search step."""

    kind: SpanKind
    start: int
    stop: int
    step: int = -1

    @property
    def by_policy(self) -> bool:
        return self.kind not in ENVIRONMENT_KINDS


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its gold answers.

    Attributes:
        id: unique within a data set; counterfactual passages are never drawn from a rollout of the same id.
        text: the question.
        answers: gold answer and aliases; at least one, none empty.
        supporting: ids of the passages that together support the answer (may be empty when unknown).
        plan: search queries that reach the supporting passages in order (for demonstrations; may be empty).
        kind: free label such as "one_hop" or "bridge", used to break evaluation down.
        path: of a question that was written in self-play, how it was constructed: each query of its author with what it
            showed; "" is the query of what the author began with. Privileged: a teacher sees it, the student does not.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    supporting: tuple[str, ...] = ()
    plan: tuple[str, ...] = ()
    kind: str = ""
    path: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"question {self.id!r}: text is empty")
        if not self.answers or any(not a.strip() for a in self.answers):
            raise ValueError(
                f"question {self.id!r}: answers must hold at least one non-empty gold answer, got {self.answers!r}"
            )


@dataclass(frozen=True, slots=True)
class Search:
    """One executed search: the query text as parsed, the ids of the passages shown, whether retrieval failed; and in a
    grammar with several queries a search those that were executed (`query` then holds them one a line), else ()."""

    step: int
    query: str
    passage_ids: tuple[str, ...]
    failed: bool = False
    queries: tuple[str, ...] = ()

    @property
    def num_queries(self) -> int:
        return max(1, len(self.queries))


@dataclass(frozen=True, slots=True)
class Inquiry(Search):
    """A question put to a user, in place of a search: `query` is the question.

    Attributes:
        before: regions that could be meant before the reply, at least 1.
        remaining: those of them, by number, that still can after it; at least one.
    """

    before: int = 1
    remaining: tuple[int, ...] = (0,)

    @property
    def bits(self) -> float:
        """What the reply told of the region that is meant: log2 of the regions before over those after it."""
        return math.log2(self.before / len(self.remaining))


@dataclass(slots=True)
class Episode:
    """One of the episodes of a rollout that goes on after an answer (MR-Search, arXiv 2603.11327). It begins where the
    one before ended, with what the environment wrote then.

    Attributes:
        stop: the token after its last one.
        searches: number of searches that the rollout had executed when it ended.
        answer: text of its answer, None when it ended without one.
        rewards: reward parts by name, of the rollout as it was at `stop`; filled after the rollout.
    """

    stop: int
    searches: int
    answer: str | None = None
    rewards: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Rollout:
    """One sampled trajectory.

    Attributes:
        question: what was asked.
        tokens: token ids, prompt included, exactly as fed or sampled.
        prompt_length: number of leading prompt tokens.
        spans: consecutive spans that tile `[0, len(tokens))`.
        logprobs: log-prob under which each token was sampled (nats); NaN where the environment wrote.
        group: index of the group of rollouts that share this question.
        finish: why it ended: "answered", "unclosed", "context" (documented with the engine).
        answer: text of the answer span, of the last one where an answer was followed by more; None when there is none.
        searches: the executed searches, in order of `step`; those of a user are each an `Inquiry`.
        rewards: reward parts by name; filled after the rollout, but for those that its environment measures.
        counts: what went wrong and how often, e.g. {"invalid_turns": 1, "forged_tags": 2}.
        episodes: its episodes in order, the last one up to its end; [] for a rollout that is a single one.
        agent: which agent of a pipeline wrote it; "" where there is one policy.
    """

    question: Question
    tokens: list[int]
    prompt_length: int
    spans: list[Span]
    logprobs: list[float]
    group: int = 0
    finish: str = "answered"
    answer: str | None = None
    searches: list[Search] = field(default_factory=list)
    rewards: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    episodes: list[Episode] = field(default_factory=list)
    agent: str = ""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise ValueError unless spans and episodes tile the tokens and every policy token has a finite log-prob."""
        where = f"rollout of question {self.question.id!r}"
        if len(self.logprobs) != len(self.tokens):
            raise ValueError(f"{where}: logprobs has {len(self.logprobs)} entries for {len(self.tokens)} tokens")
        if not 0 < self.prompt_length <= len(self.tokens):
            raise ValueError(f"{where}: prompt_length {self.prompt_length} not in [1, {len(self.tokens)}]")
        at = 0
        for span in self.spans:
            if span.start != at or span.stop <= span.start:
                raise ValueError(f"{where}: spans must tile the tokens; {span} does not start at {at} or is empty")
            if span.by_policy:
                bad = next((i for i in range(span.start, span.stop) if not math.isfinite(self.logprobs[i])), None)
                if bad is not None:
                    raise ValueError(f"{where}: log-prob of policy token {bad} is {self.logprobs[bad]}")
            at = span.stop
        if at != len(self.tokens):
            raise ValueError(f"{where}: spans end at {at}, tokens at {len(self.tokens)}")
        if not self.spans or self.spans[0].kind is not SpanKind.PROMPT or self.spans[0].stop != self.prompt_length:
            raise ValueError(f"{where}: the first span must be PROMPT of length prompt_length={self.prompt_length}")
        stops = [self.prompt_length, *(episode.stop for episode in self.episodes)]
        if self.episodes and (stops[-1] != len(self.tokens) or any(a >= b for a, b in pairwise(stops))):
            raise ValueError(
                f"{where}: episodes must end one after another, the last one at {len(self.tokens)}, got {stops[1:]}"
            )
        if between := set(stops[1:]) - {span.stop for span in self.spans}:
            raise ValueError(f"{where}: episodes must end where a span does, got {min(between)}")
        executed = [0, *(episode.searches for episode in self.episodes), len(self.searches)]
        if self.episodes and executed != sorted(executed):
            raise ValueError(
                f"{where}: searches of episodes must not fall, from 0 to {len(self.searches)}, got {executed[1:-1]}"
            )

    def steps(self) -> list[int]:
        """Search steps that have query tokens, ascending."""
        return sorted({s.step for s in self.spans if s.kind is SpanKind.QUERY and s.step >= 0})

    def find(self, kind: SpanKind, step: int) -> Span | None:
        """The first span of this kind and step, None when there is none."""
        return next((s for s in self.spans if s.kind is kind and s.step == step), None)

    @property
    def queries_per_search(self) -> float:
        """Mean number of executed queries of its searches; 0 without a search."""
        return sum(s.num_queries for s in self.searches) / len(self.searches) if self.searches else 0.0

    @property
    def inquiries(self) -> list[Inquiry]:
        """Those of its searches that are questions to a user."""
        return [search for search in self.searches if isinstance(search, Inquiry)]

    def turns(self) -> list[slice]:
        """The tokens of each turn: what the policy wrote between two messages of the environment."""
        turns: list[slice] = []
        for span in self.spans:
            if not span.by_policy:
                continue
            if turns and turns[-1].stop == span.start:
                turns[-1] = slice(turns[-1].start, span.stop)
            else:
                turns.append(slice(span.start, span.stop))
        return turns

    @property
    def reward(self) -> float:
        """The total reward, `rewards["total"]`; ValueError before rewards were assigned."""
        return self._total(self.rewards)

    @property
    def episode_rewards(self) -> list[float]:
        """The total reward of each episode; of a rollout that is a single one its own. ValueError before rewards were
        assigned."""
        return [self._total(episode.rewards) for episode in self.episodes] or [self.reward]

    def _total(self, rewards: dict[str, float]) -> float:
        if "total" not in rewards:
            raise ValueError(f"rollout of question {self.question.id!r} has no reward 'total'; parts: {rewards}")
        return rewards["total"]

    def until(self, episode: Episode) -> Rollout:
        """The rollout as it was when one of its episodes ended: with that answer, and without rewards and counts."""
        return replace(
            self,
            tokens=self.tokens[: episode.stop],
            spans=[span for span in self.spans if span.stop <= episode.stop],
            logprobs=self.logprobs[: episode.stop],
            finish=self.finish if episode.answer is None else "answered",
            answer=episode.answer,
            searches=self.searches[: episode.searches],
            rewards={},
            counts={},
            episodes=[],
        )
