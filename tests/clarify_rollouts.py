"""Rollouts in a small scene, written through the real environment and transcript."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from stepcredit.data.referring import Referral
from stepcredit.data.scenes import Scene, Thing, describe
from stepcredit.environments import ClarifyEnvironment
from stepcredit.protocol import get_protocol
from stepcredit.rollout import Question, Rollout
from stepcredit.train.engine.transcript import Transcript

CLARIFY = get_protocol("clarify")
#: Four circles, two colours by two sizes, and a square; the large red circle is meant.
SCENE = Scene(
    (
        Thing("red", "circle", "small", 16, 16),
        Thing("red", "circle", "large", 48, 16),
        Thing("blue", "circle", "small", 16, 48),
        Thing("blue", "circle", "large", 48, 48),
        Thing("green", "square", "large", 80, 80),
    )
)
QUESTION = Question(
    "circles",
    f"The scene shows: {describe(SCENE)}. Which region is the circle?",
    ("large red circle, top centre",),
    plan=("What colour is it?", "What size is it?"),
    kind="two_questions",
)
REFERRALS = {"circles": Referral(SCENE, "the circle", (0, 1, 2, 3), 1)}


def environment(**options: object) -> ClarifyEnvironment:
    return ClarifyEnvironment(REFERRALS, CLARIFY, **{"max_questions": 4, **options})


def converse(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[str],
    *,
    group: int = 0,
    question: Question = QUESTION,
    env: ClarifyEnvironment | None = None,
) -> Rollout:
    """What comes of these turns of the policy; the reward is the IoU."""
    env = env or environment()
    transcript = Transcript(question, CLARIFY.prompt(question, tokenizer), tokenizer, CLARIFY)
    faults, forced, answer = 0, False, None
    for text in turns:
        ids = tokenizer.encode(text, add_special_tokens=False)
        turn = transcript.add_policy(ids, [-1.0] * len(ids), forced)
        (response,) = env.respond([turn], [transcript.searches], [faults], [forced], [question])
        faults, forced = faults + response.fault, response.forced_answer
        transcript.add_response(response, room=10**6)
        if response.done:
            answer = turn.content if turn.action == "answer" else None
            break
    rollout = transcript.finish("unclosed" if answer is None else "answered", answer, group)
    rollout.rewards["total"] = rollout.rewards["iou"]
    return rollout


def ask(text: str) -> str:
    return f"<think>hm</think><ask> {text} </ask>"


def answer(text: str) -> str:
    return f"<answer> {text} </answer>"
