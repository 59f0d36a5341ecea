"""The examiner of self-play: walks a corpus with the search tool and writes a question, which is verified here.

A walk begins with a seed passage in its prompt. The policy searches, and ends with a question and its answer:

    <search> France </search>
    <question> What is the capital of the country where Lyon lies? </question>
    <answer> Paris </answer>

(tags and wording are ours: the paper's are not known). What the walk showed is the question's construction path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from stepcredit.environments.search import SearchEnvironment, cut_passage
from stepcredit.protocol import Protocol, escape_tags
from stepcredit.retrieval import Passage
from stepcredit.rewards import normalize_answer, states
from stepcredit.rollout import Question, Rollout, SpanKind
from stepcredit.tokens import decode, special_text
from stepcredit.turn import Piece, Turn

#: Why a walk's question is rejected, in the order in which it is checked:
#: "format" (no closed question with a closed answer after it, one of them empty, or with tags or the text of a special
#: token inside), "no_search" (no search showed a passage), "unsupported" (the answer stands in no passage that was
#: shown), "leaks" (it stands in the question), "duplicate" (the question was accepted before).
REASONS = ("format", "no_search", "unsupported", "leaks", "duplicate")

_WRITTEN = re.compile(
    r"<\s*question\s*>((?:(?!<\s*question).)*?)<\s*/\s*question\s*>\s*<\s*answer\s*>(.*?)<\s*/\s*answer\s*>", re.DOTALL
)

_INSTRUCTION = """\
Write a hard question whose answer can be found by searching. You begin with the passage below. To walk on, write \
<search> your query </search>; what was found comes back between <information> and </information>. You may search \
several times. Then write a question on what you found between <question> and </question>, and right after it its \
answer between <answer> and </answer>: a name, a number or a few words that stand in a passage, for example \
<question> Which lake lies between Lausanne and Evian? </question> <answer> Lake Geneva </answer>. The question must \
be clear to somebody who sees none of the passages, and must not hold its answer."""


@dataclass(frozen=True, slots=True)
class ExaminerProtocol(Protocol):
    """The examiner's grammar: a turn is a search, or a question with its answer.

    The texts of both are ANSWER. When the searches are used up the environment opens the question.
    """

    name: str = field(default="examiner", init=False)
    documents_tag: str = field(default="information", init=False)
    refine_tag: str | None = field(default=None, init=False)
    instruction: str = field(default=_INSTRUCTION, init=False)

    @property
    def restating(self) -> dict[str, SpanKind]:
        return {"question": SpanKind.ANSWER}

    @property
    def answer_opener(self) -> str:
        """What opens the question, and its answer after it."""
        return "<question>"

    @property
    def invalid_notice(self) -> str:
        return "\nThat was not a valid action: write one search, or one question with its answer, inside their tags.\n"

    def shown_question(self, question: Question) -> str:
        """The seed passage. It is untrusted, like those that are found."""
        return f"Passage: {escape_tags(question.text.strip())}\n"

    def parse_turn(self, text: str, forced_answer: bool = False) -> Turn:
        """As in `Protocol`; after a forced opener the turn begins inside the question."""
        if not forced_answer:
            return Protocol.parse_turn(self, text)
        opened = len(self.answer_opener)
        turn = Protocol.parse_turn(self, self.answer_opener + text)
        if turn.action != "answer":  # a search, which comes too late, or nothing that is closed
            pieces = (Piece(SpanKind.THINK, 0, len(text)),) if text else ()
            return Turn("invalid", "", pieces, turn.forged_tags)
        moved = (replace(p, start=p.start - opened, stop=p.stop - opened) for p in turn.pieces[1:])
        return replace(turn, pieces=tuple(moved))

    def written(self, text: str) -> tuple[str, str] | None:
        """The question and the answer of a turn's text, opener included; None where they are not well formed."""
        found = _WRITTEN.search(text)
        if found is None:
            return None
        question, answer = (" ".join(part.split()) for part in found.groups())
        empty = not normalize_answer(question) or not normalize_answer(answer)
        tagged = escape_tags(question + answer) != question + answer
        return None if empty or tagged else (question, answer)


EXAMINER = ExaminerProtocol()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a walk: its question, with the path that led to it, or why it was rejected (one of `REASONS`)."""

    question: Question | None
    reason: str = ""


class ExaminerEnvironment(SearchEnvironment):
    """Answers the turns of a walk like any search, and verifies what it wrote. Arguments as in `SearchEnvironment`."""

    def verify(
        self, walks: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase, asked: set[str], name: str
    ) -> list[Verdict]:
        """Whether the question of each walk can be asked.

        Texts are compared as `normalize_answer` leaves them, the answer as whole words and inside one line of what was
        shown, which is one passage; the seed passage counts.

        Args:
            walks: rollouts of `seed_question`s with `EXAMINER`.
            tokenizer: of the policy.
            asked: the normalised questions that were accepted so far; those accepted now are added, so that of equal
                ones the first counts.
            name: the accepted questions' ids are "<name>:<number of the walk>".
        """
        return [self._verify(walk, tokenizer, asked, f"{name}:{number}") for number, walk in enumerate(walks)]

    def _verify(self, walk: Rollout, tokenizer: PreTrainedTokenizerBase, asked: set[str], name: str) -> Verdict:
        written = EXAMINER.written(_last_turn(walk, tokenizer)) if walk.finish == "answered" else None
        if written is None or special_text(tokenizer, "\n".join(written)) is not None:
            return Verdict(None, "format")  # a chat template would read the text of a special token as that token
        question, answer = written
        path = construction_path(walk, tokenizer)
        if len(path) < 2:
            return Verdict(None, "no_search")
        if not any(states(line, answer) for _, shown in path for line in shown.splitlines()):
            return Verdict(None, "unsupported")
        if states(question, answer):
            return Verdict(None, "leaks")
        if (normal := normalize_answer(question)) in asked:
            return Verdict(None, "duplicate")
        asked.add(normal)
        return Verdict(Question(name, question, (answer,), path=path))


def seed_question(passage: Passage, words: int | None = None) -> Question:
    """What an examiner's rollout is of: a passage to begin with, cut to `words` words. As nobody asks it, the passage
    is also its answer."""
    shown, _ = cut_passage(passage, words)
    text = " ".join(f"{shown.title}: {shown.text}".split())
    return Question(f"seed:{passage.id}", text, (text,))


def construction_path(walk: Rollout, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, str], ...]:
    """The path of a walk, as `Question.path`: its seed passage, and each search that found something with what that
    showed."""
    path = [("", escape_tags(walk.question.text))]
    for search in walk.searches:
        span = walk.find(SpanKind.DOCUMENTS, search.step)
        if span is not None and search.passage_ids:
            path.append((search.query, EXAMINER.shown(decode(tokenizer, walk.tokens[span.start : span.stop]))))
    return tuple(path)


def _last_turn(walk: Rollout, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the policy wrote since the environment last spoke, after the opener if that is what it wrote last."""
    last = max((s for s in walk.spans if not s.by_policy), key=lambda s: s.stop)
    message = decode(tokenizer, walk.tokens[last.start : last.stop])
    forced = last.kind is SpanKind.NOTICE and message.endswith(EXAMINER.answer_opener)
    return (EXAMINER.answer_opener if forced else "") + decode(tokenizer, walk.tokens[last.stop :])
