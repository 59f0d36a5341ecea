"""The search environment: executes queries, one batched retriever call per turn, and bounds the rollout."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, zip_longest
from typing import TYPE_CHECKING

from stepcredit._validate import at_least, one_length
from stepcredit.environments.base import Response, fault
from stepcredit.protocol import Protocol
from stepcredit.retrieval import RetrievalError
from stepcredit.rollout import Episode, Search, SpanKind
from stepcredit.turn import Turn

if TYPE_CHECKING:
    from stepcredit.retrieval import Hits, Passage, Retriever
    from stepcredit.rollout import Question


class SearchEnvironment:
    """Answers turns with retrieved passages.

    * A search is answered with passages. The one that uses up `max_searches` is followed by a forced answer.
    * Where a search holds several queries, the best passage of each comes first, in the order of the queries, then the
      second of each, and so on; a passage is shown once, where it comes first.
    * An invalid turn, an empty query and a search beyond the limit are *faults*: each gets a notice, and the fault
      after `max_invalid` of them forces the answer.
    * A failed retrieval, which is one that raises RetrievalError, is answered with a notice, uses up one search, and
      the rollout goes on. Whatever else a retriever raises is a mistake in a program and ends the run.
    * An answer ends the rollout, and so does anything but an answer after a forced opener.
    * A rollout of several `episodes` ends with the last one's answer. The answers before are replied to with a notice
      that asks to reflect on them and to search further; searches and faults are counted anew then.

    Args:
        retriever: `search(queries, k) -> Hits`; called at most once per `respond`, never with an empty query.
        protocol: the tag grammar.
        top_k: passages per query; several queries that find the same ones show fewer.
        max_searches: executed searches per episode.
        passage_words: cut titles and texts of passages to this many words each; None leaves them whole.
        force_answer: open the answer when searches or faults are used up; where False the rollout then ends.
        max_invalid: faults that are answered with a notice only.
        skip_shown: leave out the passages that the rollout was shown by an earlier search, and show the next best, so
            that a search repeated is not a search wasted.
        episodes: answers per rollout (MR-Search, arXiv 2603.11327: 3).
    """

    def __init__(
        self,
        retriever: Retriever,
        protocol: Protocol,
        *,
        top_k: int = 3,
        max_searches: int = 4,
        passage_words: int | None = None,
        force_answer: bool = True,
        max_invalid: int = 1,
        skip_shown: bool = False,
        episodes: int = 1,
    ) -> None:
        self.retriever = retriever
        self.protocol = protocol
        self.top_k = top_k
        self.max_searches = max_searches
        self.passage_words = passage_words
        self.force_answer = force_answer
        self.max_invalid = max_invalid
        self.skip_shown = skip_shown
        self.episodes = episodes
        at_least(self, "", top_k=1, max_searches=0, passage_words=1, max_invalid=0, episodes=1)

    def respond(
        self,
        turns: Sequence[Turn],
        searches: Sequence[Sequence[Search]],
        faults: Sequence[int],
        forced: Sequence[bool],
        *,
        episodes: Sequence[Sequence[Episode]] | None = None,
        questions: Sequence[Question] = (),
    ) -> list[Response]:
        """Reply to one turn of each active rollout.

        Args:
            turns: N parsed turns.
            searches: N lists of the searches executed so far.
            faults: N numbers of faults so far, in the episode under way.
            forced: N flags, whether this turn followed a forced answer opener.
            episodes: N lists of the episodes that are over; None: there are none, in an environment of one episode.
            questions: not looked at: what is found depends on the query alone.

        Returns:
            N responses, in order.
        """
        if episodes is None:
            if self.episodes > 1:
                raise ValueError(f"episodes must be given to an environment of {self.episodes} episodes, got None")
            episodes = [()] * len(turns)
        one_length(turns=turns, searches=searches, faults=faults, forced=forced, episodes=episodes)
        # Searches that are left in the episode under way.
        left = [
            self.max_searches - (len(done) - (over[-1].searches if over else 0))
            for done, over in zip(searches, episodes, strict=True)
        ]
        asked = [i for i, turn in enumerate(turns) if turn.action == "search" and turn.content and left[i] > 0]
        shown = [{p for search in searches[i] for p in search.passage_ids} if self.skip_shown else set() for i in asked]
        hits, failure = self._retrieve([turns[i].queries or (turns[i].content,) for i in asked], shown)
        found = dict(zip(asked, hits, strict=True))
        responses = []
        for i, turn in enumerate(turns):
            if i in found:
                responses.append(self._searched(turn, len(searches[i]), left[i] == 1, *found[i], failure))
            elif turn.action == "answer":
                responses.append(self._answered(turn, len(episodes[i])))
            elif turn.action == "invalid":
                responses.append(fault(self, "invalid_turns", self.protocol.invalid_notice, faults[i], forced[i]))
            elif not turn.content:
                responses.append(fault(self, "empty_queries", self.protocol.empty_query_notice, faults[i], forced[i]))
            else:
                responses.append(fault(self, "excess_searches", self.protocol.exhausted_notice, faults[i], forced[i]))
        return responses

    def _retrieve(
        self, searches: list[tuple[str, ...]], shown: list[set[str]]
    ) -> tuple[list[tuple[list[Passage], dict[str, int]]], bool]:
        """For each search, which is a tuple of queries, its passages and how many were left out: better ones that are
        among those `shown`, and duplicates; and whether retrieval failed (then there are none)."""
        if not searches:
            return [], False
        queries = [query for search in searches for query in search]
        try:
            hits: Hits = self.retriever.search(queries, self.top_k + max(map(len, shown)))
        except RetrievalError as error:  # a lost search must not lose the other rollouts
            warnings.warn(f"retrieval of {len(queries)} queries failed: {error!r}", stacklevel=3)
            return [([], {}) for _ in searches], True
        if len(hits.passages) != len(queries):
            raise ValueError(f"retriever returned {len(hits.passages)} rows of passages for {len(queries)} queries")
        rows = iter(hits.passages)
        found = []
        for search, known in zip(searches, shown, strict=True):
            ranked, skipped = [], 0
            for row in islice(rows, len(search)):
                new = [rank for rank, passage in enumerate(row) if passage.id not in known][: self.top_k]
                ranked.append([row[rank] for rank in new])
                skipped += new[-1] + 1 - len(new) if new else len(row)
            passages = ranked[0] if len(search) == 1 else _in_turn(ranked)
            duplicates = sum(map(len, ranked)) - len(passages)
            found.append((passages, {"skipped_passages": skipped, "duplicate_passages": duplicates}))
        return found, False

    def _answered(self, turn: Turn, over: int) -> Response:
        counts = {} if turn.content else {"empty_answers": 1}
        if over + 1 >= self.episodes:
            return Response(done=True, counts=counts)
        return Response(self.protocol.reflection_notice, answer=turn.content, counts=counts)

    def _searched(
        self, turn: Turn, step: int, last: bool, passages: list[Passage], left_out: dict[str, int], failed: bool
    ) -> Response:
        counts = {"repeated_queries": turn.repeated_queries, "dropped_queries": turn.dropped_queries, **left_out}
        if failed:
            text, kind = self.protocol.failed_notice, SpanKind.NOTICE
            counts["failed_retrievals"] = 1
        else:
            shown = [cut_passage(p, self.passage_words) for p in passages]
            text, kind = self.protocol.documents([p for p, _ in shown]), SpanKind.DOCUMENTS
            counts["empty_results"] = not passages
            counts["cut_passages"] = sum(was_cut for _, was_cut in shown)
        forced = self.force_answer and last
        counts["forced_answers"] = forced
        search = Search(step, turn.query, tuple(p.id for p in passages), failed, turn.queries)
        happened = {name: int(count) for name, count in counts.items() if count}
        return Response(text, kind, search, forced_answer=forced, counts=happened)


def cut_passage(passage: Passage, words: int | None) -> tuple[Passage, bool]:
    """The passage with at most so many words of its title and of its text (None: all), and whether it lost any."""
    if words is None:
        return passage, False
    title, text = passage.title.split(), passage.text.split()
    shown = replace(passage, title=" ".join(title[:words]), text=" ".join(text[:words]))
    return shown, max(len(title), len(text)) > words


def _in_turn(rows: list[list[Passage]]) -> list[Passage]:
    """The first passage of each row, then the second of each, and so on; each passage once, where it comes first."""
    unique: dict[str, Passage] = {}
    for rank in zip_longest(*rows):
        for passage in rank:
            if passage is not None:
                unique.setdefault(passage.id, passage)
    return list(unique.values())
