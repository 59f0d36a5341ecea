import random
from collections import Counter

import pytest

from stepcredit.data.demonstrations import DemonstrationMix, demonstrate, demonstrations
from stepcredit.rollout import Question

TWO_HOP = Question(id="q2", text="Currency where Lyon lies?", answers=("Euro", "EUR"), plan=("Lyon", "France"))
ONE_HOP = Question(id="q1", text="Capital of France?", answers=("Paris",), plan=("France",))
NO_PLAN = Question(id="q3", text="Which river of France flows through the city of Lyon?", answers=("Rhône",))
ZERO = {"question": 0.0, "one_hop": 0.0, "repeat": 0.0}


@pytest.mark.parametrize(
    ("question", "quality", "queries"),
    [
        (TWO_HOP, "good", ("Lyon", "France")),
        (TWO_HOP, "question", ("Currency where Lyon lies?",)),
        (TWO_HOP, "one_hop", ("Lyon",)),
        (TWO_HOP, "repeat", ("Lyon", "Lyon")),
        (ONE_HOP, "good", ("France",)),
        (ONE_HOP, "question", ("Capital of France?",)),
        (ONE_HOP, "one_hop", ("France",)),
        (ONE_HOP, "repeat", ("France", "France")),
    ],
)
def test_scripts(question, quality, queries):
    script = demonstrate(question, quality, random.Random(0))
    assert script.queries == queries
    assert script.answer == question.answers[0]
    assert (script.question, script.quality) == (question, quality)


def test_shares_hold_and_seeds_differ():
    questions = [Question(id=str(i), text="t", answers=("a",), plan=("p", "q")) for i in range(180)]
    scripts = demonstrations(questions)
    assert Counter(s.quality for s in scripts) == {"good": 72, "question": 36, "one_hop": 36, "repeat": 36}
    assert [s.question for s in scripts] == questions
    assert demonstrations(questions, seed=0) == scripts != demonstrations(questions, seed=1)
    assert 20 <= sum(s.quality == "good" for s in scripts[:90]) <= 52  # spread over the list, not in blocks


def test_shares_hold_to_within_one_on_odd_numbers():
    mix = DemonstrationMix(good=0.5, question=0.0, one_hop=0.25, repeat=0.25)
    counts = Counter(s.quality for s in demonstrations([TWO_HOP] * 13, mix))
    assert counts["question"] == 0
    assert abs(counts["good"] - 6.5) < 1
    assert abs(counts["repeat"] - 3.25) < 1
    assert counts.total() == 13
    assert demonstrations([]) == []


def test_pure_mix_is_pure():
    mix = DemonstrationMix(good=0.0, question=0.0, one_hop=0.0, repeat=1.0)
    assert {s.quality for s in demonstrations([TWO_HOP] * 50, mix)} == {"repeat"}


def test_fragments_are_pieces_of_the_question_and_need_no_plan():
    mix = DemonstrationMix(**ZERO, good=0.0, fragments=1.0)
    assert not mix.needs_plan
    scripts = demonstrations([NO_PLAN] * 200, mix)
    words = NO_PLAN.text.rstrip("?").split()
    pieces = {" ".join(words[a : a + n]) for n in range(2, 5) for a in range(len(words) - n + 1)}
    assert {s.quality for s in scripts} == {"fragments"}
    assert {query for s in scripts for query in s.queries} == pieces  # all lengths, from the first word to the last
    assert {len(s.queries) for s in scripts} == {2}
    assert demonstrations([NO_PLAN] * 200, mix) == scripts != demonstrations([NO_PLAN] * 200, mix, seed=1)
    (short,) = demonstrations([Question(id="q4", text="Who?", answers=("a",))], mix)
    assert short.queries == ("Who", "Who")
    assert DemonstrationMix(**{**ZERO, "question": 0.5}, good=0.0, fragments=0.5).needs_plan is False
    assert DemonstrationMix().needs_plan


def test_guesses_and_idle_questions():
    """The answer at once, and questions to a user for what the plan does not ask for."""
    scene = Question(id="s", text="Which one?", answers=("red circle",), plan=("What colour is it?",))
    mix = DemonstrationMix(**ZERO, good=0.0, guess=0.5, idle=0.5)
    assert not mix.needs_plan
    scripts = demonstrations([scene] * 60, mix)
    assert Counter(s.quality for s in scripts) == {"guess": 30, "idle": 30}
    assert {s.queries for s in scripts} == {(), ("What shape is it?",), ("What size is it?",), ("Where is it?",)}
    assert {s.answer for s in scripts} == {"red circle"}
    assert all(not s.queries for s in scripts if s.quality == "guess")


def test_bad_mixes_are_named():
    with pytest.raises(ValueError, match=r"must sum to 1, got 1\.1"):
        DemonstrationMix(good=0.5)
    with pytest.raises(ValueError, match=r"repeat must lie in \[0, 1\], got -0\.2"):
        DemonstrationMix(good=0.8, repeat=-0.2)
    with pytest.raises(ValueError, match="good must lie"):
        DemonstrationMix(good=float("nan"))


def test_bad_questions_and_qualities_are_named():
    with pytest.raises(ValueError, match="question 'q3' has no plan"):
        demonstrations([TWO_HOP, NO_PLAN], DemonstrationMix(**ZERO, good=1.0))
    with pytest.raises(
        ValueError, match="quality is 'goood', expected one of good, question, one_hop, repeat, fragments"
    ):
        demonstrate(TWO_HOP, "goood", random.Random(0))
