"""Rollouts of several episodes: in the environment, in transcripts, on rollouts, in rewards, from an engine."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from stepcredit.batch import RolloutBatch
from stepcredit.credit.hindsight import with_block
from stepcredit.data.demonstrations import Demonstration
from stepcredit.environments import Response, SearchEnvironment
from stepcredit.evaluate import summarize
from stepcredit.protocol import PROTOCOLS
from stepcredit.retrieval import Hits, Passage
from stepcredit.rollout import ENVIRONMENT_KINDS, Episode, Question, Rollout, Search, SpanKind
from stepcredit.train.config import EnvironmentConfig
from stepcredit.train.engine import HFEngine, Sampling
from stepcredit.train.engine.transcript import Transcript
from stepcredit.train.loop import warm_start_scripts
from stepcredit.train.rewards import RewardWeights, assign_rewards
from stepcredit.train.warm_start import play
from tiny_run import tiny_config, tiny_parts
from tokenizers_under_test import BUILT

PROTOCOL = PROTOCOLS["refine"]
QUESTION = Question("q", "Where is it?", ("in Peru",), supporting=("lima0", "peru0"), plan=("Lima", "Peru"))
SEARCH = PROTOCOL.parse_turn("<search> lima </search>")
ANSWER = PROTOCOL.parse_turn("<answer>Rome</answer>")
EMPTY = PROTOCOL.parse_turn("<answer> </answer>")
INVALID = PROTOCOL.parse_turn("hm")


class Echo:
    """Finds passages titled by the query."""

    def search(self, queries, k):
        rows = [[Passage(f"{q.lower()}{i}", q, f"about {q}") for i in range(k)] for q in queries]
        return Hits(np.ones((len(rows), k), np.float32), [[p.id for p in row] for row in rows], rows)


def environment(**options):
    return SearchEnvironment(Echo(), PROTOCOL, **{"top_k": 1, "max_searches": 2, "episodes": 3, **options})


def one(env, turn, *, searches=0, over=(), faults=0, forced=False):
    """The response to a turn after so many searches, in a rollout whose episodes ended after `over` searches."""
    done = [Search(step, "x", ()) for step in range(searches)]
    return env.respond([turn], [done], [faults], [forced], episodes=[[Episode(9, n, "a") for n in over]])[0]


def turns_of(rollout):
    return [(s.kind.value, s.step) for s in rollout.spans if s.kind not in (SpanKind.TAG, SpanKind.THINK)]


# The environment


def test_answers_before_the_last_are_replied_to():
    reflect = Response(PROTOCOL.reflection_notice, answer="Rome")
    assert reflect.kind in ENVIRONMENT_KINDS
    env = environment()
    assert one(env, ANSWER) == one(env, ANSWER, over=(1,)) == reflect
    assert one(env, ANSWER, over=(1, 2)) == Response(done=True)
    assert one(env, PROTOCOL.parse_turn("Rome</answer>", True), forced=True) == reflect
    assert one(env, EMPTY) == Response(PROTOCOL.reflection_notice, answer="", counts={"empty_answers": 1})
    assert one(environment(episodes=1), ANSWER) == Response(done=True)
    for protocol in PROTOCOLS.values():  # no tag that could be taken for an action or for passages
        assert not protocol.closes(protocol.reflection_notice)
        assert not protocol.shows_documents(protocol.reflection_notice)
        assert protocol.parse_turn(protocol.reflection_notice).action == "invalid"


def test_searches_are_counted_anew_and_numbered_on():
    env = environment()
    first = one(env, SEARCH, searches=2, over=(2,))
    assert first.search == Search(2, "lima", ("lima0",))
    assert not first.forced_answer
    last = one(env, SEARCH, searches=3, over=(2,))
    assert last.search.step == 3
    assert last.forced_answer
    assert one(env, SEARCH, searches=4, over=(2,)).counts == {"excess_searches": 1}
    assert one(env, SEARCH, searches=2).counts == {"excess_searches": 1}
    assert one(env, SEARCH, searches=1, over=(0, 0)).forced_answer
    fresh = [[Search(0, "lima", ("lima0",))]], [[Episode(9, 1, "a")]]
    (shown,) = environment(skip_shown=True).respond([SEARCH], fresh[0], [0], [False], episodes=fresh[1])
    assert shown.search.passage_ids == ("lima1",)  # passages of earlier episodes were shown too


def test_an_episode_without_an_answer_ends_the_rollout():
    assert one(environment(), PROTOCOL.parse_turn("Rome", True), forced=True).done
    assert one(environment(force_answer=False), INVALID, faults=1).done


def test_a_caller_without_episodes_is_refused():
    with pytest.raises(ValueError, match="episodes must be given to an environment of 3 episodes, got None"):
        environment().respond([ANSWER], [[]], [0], [False])
    with pytest.raises(ValueError, match="one length, got 1, 1, 1, 1, 0"):
        environment().respond([ANSWER], [[]], [0], [False], episodes=[])
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        environment(episodes=0)
    with pytest.raises(ValueError, match=r"environment\.episodes must be at least 1, got 0"):
        EnvironmentConfig(episodes=0)


# Transcripts and rollouts


def write(*turns: str, room: int = 10**6, reason: str = "answered", answer: str | None = "in Peru") -> Rollout:
    """A rollout of these turns against the environment; after the last one nothing is asked."""
    tokenizer, env, faults = BUILT["byte_bpe"](), environment(), 0
    t = Transcript(QUESTION, PROTOCOL.prompt(QUESTION, tokenizer), tokenizer, PROTOCOL)
    for number, text in enumerate(turns):
        ids = tokenizer.encode(text, add_special_tokens=False)
        turn = t.add_policy(ids, [-1.0] * len(ids))
        if number < len(turns) - 1 or reason == "context":
            (response,) = env.respond([turn], [t.searches], [faults], [False], episodes=[t.episodes])
            fits = t.add_response(response, room if number == len(turns) - 1 else 10**6)
            assert (fits is None) == (reason == "context" and number == len(turns) - 1)
    return t.finish(reason, answer)


TURNS = ("<search>Lima</search>", "<answer>Rome</answer>", "<search>Peru</search>", "<answer>in Peru</answer>")


def test_episodes_end_with_their_answers():
    rollout = write(*TURNS)
    assert turns_of(rollout) == [
        ("prompt", -1),
        ("query", 0),
        ("documents", 0),
        ("answer", -1),
        ("notice", -1),
        ("query", 1),
        ("documents", 1),
        ("answer", -1),
    ]
    (notice,) = (s for s in rollout.spans if s.kind is SpanKind.NOTICE)
    assert rollout.episodes == [Episode(notice.start, 1, "Rome"), Episode(len(rollout.tokens), 2, "in Peru")]
    rollout.rewards["total"] = 0.0
    batch = RolloutBatch.pack([rollout])
    assert not batch.policy_mask[notice.start : notice.stop].any()
    assert BUILT["byte_bpe"]().decode(rollout.tokens[notice.start : notice.stop]) == PROTOCOL.reflection_notice
    assert write("<answer>in Peru</answer>").episodes == []  # a single one


def test_the_last_answer_is_the_rollouts():
    open_end = write(*TURNS[:3], "hm", reason="unclosed", answer=None)
    assert (open_end.finish, open_end.answer) == ("unclosed", "Rome")
    assert [e.answer for e in open_end.episodes] == ["Rome", None]
    assert open_end.episodes[-1].stop == len(open_end.tokens)
    full = write(*TURNS[:2], room=3, reason="context", answer=None)
    assert (full.finish, full.answer) == ("context", "Rome")
    assert full.episodes == [Episode(len(full.tokens), 1, "Rome")]
    assert write("hm", reason="unclosed", answer=None).answer is None


def test_a_rollout_until_the_end_of_an_episode():
    rollout = write(*TURNS)
    first, whole = (rollout.until(episode) for episode in rollout.episodes)
    assert first.tokens == rollout.tokens[: rollout.episodes[0].stop]
    assert turns_of(first) == turns_of(rollout)[:4]
    assert [len(r.searches) for r in (first, whole)] == [1, 2]
    assert (first.finish, first.answer, first.rewards, first.episodes) == ("answered", "Rome", {}, [])
    assert (whole.tokens, whole.answer) == (rollout.tokens, "in Peru")
    open_end = write(*TURNS[:3], "hm", reason="unclosed", answer=None)
    last = open_end.until(open_end.episodes[1])
    assert (last.finish, last.answer) == ("unclosed", None)


@pytest.mark.parametrize("stops", [[30], [30, 30], [3, -1], [-1, 30], [-1, -1]])
def test_episodes_follow_each_other_to_the_end(stops):
    rollout = write(*TURNS)
    length = len(rollout.tokens)
    ends = [length if stop < 0 else stop for stop in stops]
    message = f"episodes must end one after another, the last one at {length}, got {ends}"
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(rollout, episodes=[Episode(stop, 0) for stop in ends])


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        (lambda stop, end: [Episode(stop - 1, 0), Episode(end, 0)], "episodes must end where a span does, got "),
        (lambda stop, end: [Episode(stop, 1), Episode(end, 0)], "searches of episodes must not fall, from 0 to "),
        (lambda stop, end: [Episode(stop, -1), Episode(end, 0)], "got [-1, 0]"),
        (lambda stop, end: [Episode(stop, 0), Episode(end, 9)], "got [0, 9]"),
    ],
)
def test_episodes_end_with_a_span_and_after_searches_that_were_made(episodes, message):
    rollout = write(*TURNS)
    made = episodes(rollout.episodes[0].stop, len(rollout.tokens))
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(rollout, episodes=made)


def test_a_hindsight_block_moves_the_episodes():
    rollout = write(*TURNS)
    moved = with_block(rollout, [7, 8, 9])
    assert [episode.stop for episode in moved.episodes] == [episode.stop + 3 for episode in rollout.episodes]
    assert turns_of(moved.until(moved.episodes[0])) == turns_of(rollout)[:4]


def test_each_episode_has_the_reward_of_the_rollout_as_it_was():
    weights = RewardWeights(f1=1.0, gold_hit=0.5, format=0.2)
    rollouts = [write(*TURNS), write(*TURNS[:3], "hm", reason="unclosed", answer=None)]
    assign_rewards(rollouts, weights, BUILT["byte_bpe"]())
    right, open_end = rollouts
    assert right.episode_rewards == pytest.approx([0.5 / 2 + 0.2, 1 + 0.5 + 0.2])
    assert right.reward == right.episode_rewards[-1]
    assert right.episodes[0].rewards["gold_hit"] == 0.5
    assert right.episodes[0].rewards.keys() == right.rewards.keys()
    assert open_end.episode_rewards == pytest.approx([0.5 / 2 + 0.2, 0.5])
    improving = write(TURNS[0], "<answer>in Peru</answer>", "hm", reason="unclosed", answer=None)
    assign_rewards([improving], weights, BUILT["byte_bpe"]())
    # The episode that broke off earns no answer; the rollout keeps the one it had.
    assert improving.episode_rewards == pytest.approx([1 + 0.25 + 0.2, 0.25])
    assert improving.reward == pytest.approx(1 + 0.25)


def test_evaluation_says_what_stopping_earlier_would_have_answered():
    rollouts = [
        write(*TURNS),
        write(*TURNS[:3], "hm", reason="unclosed", answer=None),
        write("<answer>in Peru</answer>"),
    ]
    found = summarize(rollouts)
    assert found["em_episode_1"] == pytest.approx(1 / 3)
    assert found["em_episode_2"] == found["em"] == pytest.approx(2 / 3)
    assert "em_episode_3" not in found
    assert not any(name.startswith("em_episode") for name in summarize(rollouts[2:]))


# From scripts and from a policy


def demonstration(*queries, answer="in Peru", later=()):
    return Demonstration(QUESTION, "good", queries, answer, later=later)


def test_scripts_have_a_script_for_each_episode():
    parts = tiny_parts(max_searches=3)
    parts.environment.episodes = 3
    script = demonstration("Lima", answer="Rome", later=(demonstration("Lima", "Peru"),))
    alone, followed = play([demonstration("Lima"), script], parts.environment, parts.tokenizer)
    assert [s.query for s in alone.searches] == ["Lima"] * 3
    assert [s.query for s in followed.searches] == ["Lima", "Lima", "Peru", "Lima", "Peru"]  # the last one again
    assert [(e.searches, e.answer) for e in followed.episodes] == [(1, "Rome"), (3, "in Peru"), (5, "in Peru")]
    assert (followed.finish, followed.answer) == ("answered", "in Peru")


def test_the_warm_starts_episodes_are_drawn_apart():
    parts = tiny_parts()
    questions = [q for q in parts.dataset.train if len(q.plan) > 1][:40]
    plain = warm_start_scripts(tiny_config(), parts, questions)
    scripts = warm_start_scripts(tiny_config("environment.episodes=2"), parts, questions)
    assert [dataclasses.replace(s, later=()) for s in scripts] == plain
    assert all(len(s.later) == 1 and s.later[0].question is s.question for s in scripts)
    assert 5 < sum(s.later[0].quality != s.quality for s in scripts) < 40


def test_the_engine_plays_episodes_and_forwards_no_token_twice():
    parts = tiny_parts(searching=True)
    parts.environment.episodes = 3
    engine = HFEngine(parts.model, parts.tokenizer, parts.environment.protocol)
    sampling = Sampling(max_turn_tokens=24, max_answer_tokens=12, seed=3)
    rollouts = engine.rollout(parts.dataset.train[:3], parts.environment, sampling, group_size=4)
    assert {len(r.episodes) for r in rollouts if r.finish == "answered"} == {3}
    assert any(len(r.searches) > parts.environment.max_searches for r in rollouts)
    for rollout in rollouts:
        counted = [e.searches for e in rollout.episodes]
        assert all(b - a <= 2 for a, b in zip([0, *counted], counted, strict=False))
        notices = [
            parts.tokenizer.decode(rollout.tokens[e.stop : e.stop + 400])
            for e in rollout.episodes
            if e.answer is not None
        ][:2]
        assert all(text.startswith(parts.environment.protocol.reflection_notice) for text in notices)
        given = [e.answer for e in rollout.episodes if e.answer is not None]
        assert rollout.answer == (given[-1] if given else None)
    expected = sum(rollouts[4 * g].prompt_length for g in range(3))
    assert engine.tokens_forwarded == expected + sum(len(r.tokens) - r.prompt_length - 1 for r in rollouts)
