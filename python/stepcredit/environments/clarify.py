"""The referring environment: the policy may ask a user which region is meant, and its answer is scored on pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stepcredit._validate import at_least, one_length, require
from stepcredit.data.referring import Referral
from stepcredit.data.scenes import iou, region
from stepcredit.environments.base import Response, fault
from stepcredit.environments.user import User, reply
from stepcredit.protocol import Protocol
from stepcredit.rollout import Episode, Inquiry, Question, Search, SpanKind
from stepcredit.turn import Turn


class ClarifyEnvironment:
    """Answers turns with a user's replies.

    * A question is answered by the user, who knows the target. The one that uses up `max_questions` is followed by a
      forced answer. It is recorded with the candidates that were left before and after: those of which the user would
      have said the same are left.
    * A question that the user did not answer (`Reply.fault`) is counted under that name and uses up a question too.
    * An invalid turn, an empty question and one beyond the limit are *faults*, as in `SearchEnvironment`.
    * An answer ends the rollout, and so does anything but an answer after a forced opener. Its part of the reward is
      "iou", of the region that it names and the target's visible one; 0 for an answer that names none
      ("unreadable_answers") or is empty, and without an answer.

    Replies depend on the question's text and on the target alone, so that no rollout learns from another.

    Args:
        referrals: the scene, the candidates and the target of every question, by its id.
        protocol: the tag grammar, one that asks.
        max_questions: questions that are answered per rollout.
        force_answer: open the answer when questions or faults are used up; where False the rollout then ends.
        max_invalid: faults that are answered with a notice only.
        user: who replies.
    """

    def __init__(
        self,
        referrals: Mapping[str, Referral],
        protocol: Protocol,
        *,
        max_questions: int = 2,
        force_answer: bool = True,
        max_invalid: int = 1,
        user: User = reply,
    ) -> None:
        if protocol.inquiry != "ask":
            raise ValueError(f"protocol must be one that asks, such as 'clarify', got {protocol.name!r}")
        self.referrals = referrals
        self.protocol = protocol
        self.max_questions = max_questions
        self.force_answer = force_answer
        self.max_invalid = max_invalid
        self.user = user
        at_least(self, "", max_questions=0, max_invalid=0)

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
        """As `Environment.respond`, of rollouts of a single episode; ValueError for one that has ended an episode, and
        for a question without a referral."""
        one_length(turns=turns, searches=searches, faults=faults, forced=forced, questions=questions)
        require(not any(episodes or ()), "episodes", "empty: a rollout in a scene has one episode", episodes)
        responses = []
        for turn, asked, wrong, opened, question in zip(turns, searches, faults, forced, questions, strict=True):
            if question.id not in self.referrals:
                raise ValueError(f"question {question.id!r} has no scene")
            referral = self.referrals[question.id]
            if turn.action == "answer":
                response = self._answered(turn, referral)
            elif turn.action == "ask" and turn.content and len(asked) < self.max_questions:
                response = self._asked(turn, asked, referral)
            elif turn.action == "invalid":
                response = fault(self, "invalid_turns", self.protocol.invalid_notice, wrong, opened)
            elif not turn.content:
                response = fault(self, "empty_questions", self.protocol.empty_query_notice, wrong, opened)
            else:
                response = fault(self, "excess_questions", self.protocol.exhausted_notice, wrong, opened)
            response.rewards.setdefault("iou", 0.0)
            responses.append(response)
        return responses

    def _asked(self, turn: Turn, asked: Sequence[Search], referral: Referral) -> Response:
        scene, last = referral.scene, asked[-1] if asked else None
        left = last.remaining if isinstance(last, Inquiry) else referral.candidates
        said = self.user(turn.content, scene.things[referral.target], scene)
        remaining = tuple(i for i in left if self.user(turn.content, scene.things[i], scene) == said)
        forced = self.force_answer and len(asked) + 1 >= self.max_questions
        counts = {said.fault: 1} if said.fault else {}
        if forced:
            counts["forced_answers"] = 1
        inquiry = Inquiry(len(asked), turn.content, (), before=len(left), remaining=remaining)
        return Response(self.protocol.reply(said.text), SpanKind.REPLY, inquiry, forced_answer=forced, counts=counts)

    def _answered(self, turn: Turn, referral: Referral) -> Response:
        if not turn.content:
            return Response(done=True, counts={"empty_answers": 1})
        named = region(turn.content, referral.scene)
        if named is None:
            return Response(done=True, counts={"unreadable_answers": 1})
        return Response(done=True, rewards={"iou": iou(named, referral.scene.masks()[referral.target])})
