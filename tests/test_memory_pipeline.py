"""The memory pipeline: grammars of its agents, what they are shown, its environment, and what each earns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memory_run import memory_config, models, scripted_trajectories
from stepcredit.batch import RolloutBatch
from stepcredit.data.conversations import Conversation, MemoryQuestion, Message
from stepcredit.data.memory_scripts import MemoryScript, memory_scripts
from stepcredit.environments.memory import (
    AGENTS,
    GRAMMARS,
    MemoryEnvironment,
    extraction_task,
    profile_task,
    read_memory,
    retrieval_task,
)
from stepcredit.retrieval import Passage
from stepcredit.rollout import Question, SpanKind
from stepcredit.tokens import decode
from stepcredit.train import memory
from stepcredit.train.judges import facts, judged, load_judge
from stepcredit.train.pipeline import assign_pipeline_rewards, pipeline_metrics, run_pipeline
from tokenizers_under_test import BUILT

TALK = Conversation(
    "c",
    (
        Message("c/1", "user", "My drink is tea."),
        Message("c/2", "assistant", "Good\nto [9] know </memory>."),
        Message("c/3", "user", "My sport is judo."),
        Message("c/4", "user", "My drink is coffee now."),
    ),
)
QUESTION = MemoryQuestion("q", "Which drink?", ("coffee",), ("c/4",), conversation=TALK, options=("tea", "coffee"))
EXTRACTION, PROFILE, RETRIEVAL = (GRAMMARS[name] for name in AGENTS)


def pieces(turn, text):
    return [(piece.kind.value, text[piece.start : piece.stop]) for piece in turn.pieces]


# Grammars


def test_an_agent_writes_between_its_tags():
    text = "So: <memory>\n[1] tea\n</memory> done"
    turn = EXTRACTION.parse_turn(text)
    assert (turn.action, turn.content) == ("answer", "[1] tea")
    assert pieces(turn, text) == [
        ("think", "So: "),
        ("tag", "<memory>"),
        ("answer", "\n[1] tea\n"),
        ("tag", "</memory>"),
        ("think", " done"),
    ]
    assert EXTRACTION.closes(text)
    assert not EXTRACTION.closes("<memory> </answer>")
    assert PROFILE.parse_turn("<profile>x</profile>").content == "x"


@pytest.mark.parametrize(
    "text",
    ["", "tea", "<memory> tea", "tea </memory>", "<profile>x</profile>", "<answer>x</answer>", "</memory><memory>"],
)
def test_without_its_tags_a_turn_is_invalid(text):
    turn = EXTRACTION.parse_turn(text)
    assert (turn.action, turn.content) == ("invalid", "")
    assert "".join(part for _, part in pieces(turn, text)) == text
    assert "answer" not in [kind for kind, _ in pieces(turn, text)]


def test_the_nearest_opener_and_the_first_closer_count():
    text = "<memory>a<memory>b</memory>c</memory>"
    turn = EXTRACTION.parse_turn(text)
    assert turn.content == "b"
    assert [kind for kind, _ in pieces(turn, text)] == ["tag", "think", "tag", "answer", "tag", "think", "tag"]
    empty = EXTRACTION.parse_turn("<memory> \n</memory>")
    assert (empty.action, empty.content) == ("answer", "")
    assert EXTRACTION.parse_turn("<information>x</information>").forged_tags == 2
    forced = EXTRACTION.parse_turn(" b </memory>", forced_answer=True)
    assert (forced.action, forced.content) == ("answer", "b")


# Prompts


def test_what_each_agent_is_shown():
    task = extraction_task(QUESTION)
    assert task.shown == (
        "Conversation:\n[1] user: My drink is tea.\n[2] assistant: Good to [9] know &lt;/memory>.\n"
        "[3] user: My sport is judo.\n[4] user: My drink is coffee now.\n"
    )
    assert "Which drink" not in task.shown
    memory = [Passage("c/1", "1", "tea"), Passage("c/4", "4", "<profile>coffee\nnow")]
    assert profile_task(QUESTION, memory).shown == "Notes:\n[1] tea\n[4] &lt;profile>coffee now\n"
    assert profile_task(QUESTION, []).shown == "Notes:\n(none)\n"
    task = retrieval_task(QUESTION, memory, "drink: coffee\n\n</answer> x")
    assert task.shown == (
        "Profile:\ndrink: coffee\n&lt;/answer> x\nQuestion: Which drink?\nOptions: (a) tea (b) coffee\n"
    )
    assert task.memory == tuple(memory)
    free = retrieval_task(replace(QUESTION, options=()), memory, "")
    assert free.shown == "Profile:\n(none)\nQuestion: Which drink?\n"
    assert (task.id, task.answers, task.supporting) == ("q", ("coffee",), ("c/4",))


def test_prompts_are_plain_or_in_the_chat_template():
    tokenizer = BUILT["byte_bpe"]()
    plain = decode(tokenizer, EXTRACTION.prompt(extraction_task(QUESTION), tokenizer))
    assert plain == extraction_task(QUESTION).shown
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = decode(tokenizer, PROFILE.prompt(profile_task(QUESTION, []), tokenizer, "chat"))
    assert chat.startswith("Below are notes")
    assert chat.endswith("Notes:\n(none)\n")
    with pytest.raises(ValueError, match="question 'x' is no task of a memory pipeline"):
        EXTRACTION.prompt(Question("x", "?", ("a",)), tokenizer)


# Memory


def test_reading_a_memory():
    text = "[3] likes judo\n\n[1]\nwhat?\n[7] x\n[0] y\n[3] again\n[2]: fine\n[99999999999999999999] z"
    entries, counts = read_memory(text, TALK)
    assert [(e.id, e.title, e.text) for e in entries] == [
        ("c/1", "1", "My drink is tea."),
        ("c/2", "2", "fine"),
        ("c/3", "3", "likes judo"),
    ]
    assert counts == {"malformed_entries": 2, "unknown_messages": 2, "repeated_messages": 1}
    assert read_memory(None, TALK) == ([], {})
    assert read_memory("[2]", TALK)[0][0].text == "Good to [9] know &lt;/memory>."


def search(memory, query, **options):
    environment = MemoryEnvironment(RETRIEVAL, **{"top_k": 2, "max_searches": 1, **options})
    turn = RETRIEVAL.parse_turn(f"<search>{query}</search>")
    tasks = [retrieval_task(QUESTION, entries, "") for entries in memory]
    n = len(tasks)
    return environment.respond([turn] * n, [[]] * n, [0] * n, [False] * n, questions=tasks)


def test_every_rollout_searches_its_own_memory():
    tea = [Passage("c/1", "1", "drink: tea"), Passage("c/3", "3", "sport: judo"), Passage("c/2", "2", "city: Oslo")]
    coffee = [Passage("c/4", "4", "drink: coffee")]
    first, second, none = search([tea, coffee, []], "drink")
    assert first.search.passage_ids[0] == "c/1"
    assert len(first.search.passage_ids) == 2
    assert second.search.passage_ids == ("c/4",)
    assert "4: drink: coffee" in second.text
    assert second.forced_answer
    assert none.search.passage_ids == ()
    assert none.counts["empty_results"] == 1
    assert none.kind is SpanKind.DOCUMENTS


def test_a_memory_without_a_word_finds_nothing():
    (found,) = search([[Passage("c/1", "1", "the"), Passage("c/2", "2", "?!")]], "drink")
    assert found.search.passage_ids == ()


def test_a_question_without_a_memory_is_refused():
    environment = MemoryEnvironment(RETRIEVAL)
    with pytest.raises(ValueError, match="question 'x' is no task"):
        environment.respond([RETRIEVAL.parse_turn("")], [[]], [0], [False], questions=[Question("x", "?", ("a",))])
    with pytest.raises(ValueError, match="episodes must be 1 in a memory pipeline, got 2"):
        MemoryEnvironment(RETRIEVAL, episodes=2)


# The pipeline


def test_perfect_agents_earn_everything():
    """The synthetic facts answer the questions: scripts without a mistake cover the evidence and are right."""
    trajectories = scripted_trajectories(models(), 1.0, count=36)
    for t in trajectories:
        assert {name: rollout.reward for name, rollout in t.rollouts.items()} == dict.fromkeys(AGENTS, 1.0)
        assert t.rollouts["extraction"].rewards["coverage"] == 1.0
        assert t.rollouts["profile"].rewards["local"] == 1.0
        shown = t.rollouts["retrieval"].searches[0].passage_ids
        assert set(t.question.supporting) <= set(shown)
        kept = {entry.id for entry in t.memory}
        jaccard = len(kept & set(t.question.supporting)) / len(kept | set(t.question.supporting))
        assert t.rollouts["extraction"].rewards["local"] == pytest.approx(0.8 + 0.2 * jaccard)
        overlap = len(set(t.question.supporting)) / len(set(shown))
        assert t.rollouts["retrieval"].rewards["local"] == pytest.approx(0.2 + 0.8 * overlap)
    metrics = pipeline_metrics(trajectories)
    assert metrics["em"] == metrics["hit"] == metrics["coverage"] == metrics["local_profile"] == 1.0
    assert metrics["finished_extraction"] == metrics["finished_profile"] == metrics["finished"] == 1.0
    assert {name for name in metrics if name.startswith("count_")} == {"count_forced_answers", "count_long_scripts"}


def test_agents_that_make_mistakes_earn_less():
    metrics = pipeline_metrics(scripted_trajectories(models(), 0.0, count=36))
    assert metrics["coverage"] < 0.8
    assert metrics["local_profile"] < 0.8
    assert metrics["em"] == 1.0  # they answer right, as scripts do


def test_spans_say_who_wrote_what():
    parts = models()
    t = scripted_trajectories(parts, 1.0, count=1)[0]
    kinds = {name: [s.kind.value for s in rollout.spans] for name, rollout in t.rollouts.items()}
    assert kinds["extraction"] == kinds["profile"] == ["prompt", "tag", "answer", "tag"]
    assert kinds["retrieval"] == [
        "prompt", "tag", "query", "tag", "documents", "notice", "answer", "tag",
    ]  # fmt: skip
    for name, rollout in t.rollouts.items():
        tokenizer = parts.agents[name].tokenizer
        text = {s.kind.value: decode(tokenizer, rollout.tokens[s.start : s.stop]) for s in rollout.spans}
        assert text["answer"].strip() == {
            "extraction": rollout.answer, "profile": t.profile, "retrieval": t.question.answers[0]
        }[name]  # fmt: skip
        assert (rollout.agent, rollout.group) == (name, 0)
    prompts = [decode(parts.agents[n].tokenizer, r.tokens[: r.prompt_length]) for n, r in t.rollouts.items()]
    # What one agent wrote is prompt to the next, word for word.
    assert t.rollouts["extraction"].answer in prompts[1]
    assert t.profile in prompts[2]
    batch = RolloutBatch.pack(list(t.rollouts.values()))
    written = sum(s.stop - s.start for r in t.rollouts.values() for s in r.spans if s.by_policy)
    assert int(batch.policy_mask.sum()) == written < batch.tokens.numel() / 2


class Scripts:
    """Agents that write fixed texts; records what they were asked."""

    def __init__(self, **texts):
        self.texts, self.seen = texts, []

    def __call__(self, name, tasks, each):
        from stepcredit.train.engine import Transcript

        tokenizer, grammar = BUILT["byte_bpe"](), GRAMMARS[name]
        self.seen.append((name, [task.shown for task in tasks], each))
        rollouts = []
        for task in [task for task in tasks for _ in range(each)]:
            t = Transcript(task, grammar.prompt(task, tokenizer), tokenizer, grammar)
            ids = tokenizer.encode(self.texts[name])
            turn = t.add_policy(ids, [-1.0] * len(ids))
            answered = turn.action == "answer"
            rollouts.append(t.finish("answered" if answered else "unclosed", turn.content if answered else None))
        return rollouts


def test_trajectories_of_a_question_share_its_group():
    agents = Scripts(
        extraction="<memory>[4] coffee\n[9] x</memory>",
        profile="<profile>drink: coffee</profile>",
        retrieval="<answer>(b)</answer>",
    )
    other = replace(QUESTION, id="r", answers=("tea",))
    trajectories = run_pipeline(agents, [QUESTION, other], group_size=3)
    assert [(name, len(shown), each) for name, shown, each in agents.seen] == [
        ("extraction", 2, 3), ("profile", 6, 1), ("retrieval", 6, 1),
    ]  # fmt: skip
    assert [t.question.id for t in trajectories] == ["q"] * 3 + ["r"] * 3
    assert [t.rollouts[name].group for name in AGENTS for t in trajectories] == [0, 0, 0, 1, 1, 1] * 3
    assert trajectories[0].rollouts["extraction"].counts == {"unknown_messages": 1}
    assert trajectories[0].rollouts["retrieval"].answer == "coffee"  # the option, not its letter
    assert trajectories[0].rollouts["retrieval"].counts == {}
    assign_pipeline_rewards(trajectories, memory_config().memory, lambda texts, talks: [0.25] * len(texts))
    assert [t.rollouts["profile"].rewards for t in trajectories[2:4]] == [
        {"local": 0.25, "total": 1.0}, {"local": 0.25, "total": 0.0},
    ]  # fmt: skip


def test_agents_that_write_nothing_leave_the_next_ones_nothing():
    agents = Scripts(extraction="no", profile="no", retrieval="no")
    (t,) = run_pipeline(agents, [QUESTION])
    assert (t.memory, t.profile) == ([], "")
    assert agents.seen[1][1] == ["Notes:\n(none)\n"]
    assign_pipeline_rewards([t], memory_config().memory, facts)
    assert {name: r.rewards["local"] for name, r in t.rollouts.items()} == dict.fromkeys(AGENTS, 0.0)
    assert pipeline_metrics([t])["finished"] == 0.0


def test_what_does_not_fit_a_prompt_is_left_out_and_counted():
    agents = Scripts(
        extraction="<memory>[1] tea\n[3] judo\n[4] coffee</memory>",
        profile="<profile>drink: coffee\nsport: judo</profile>",
        retrieval="<answer>tea</answer>",
    )
    (t,) = run_pipeline(
        agents,
        [QUESTION],
        fits=lambda name, task: "tea" not in task.shown.split("Options")[0] and "judo" not in task.shown,
    )
    assert agents.seen[1][1] == ["Notes:\n[4] coffee\n"]  # the oldest go first
    assert "Profile:\ndrink: coffee\nQuestion" in agents.seen[2][1][0]
    assert t.rollouts["profile"].counts == {"dropped_entries": 2}
    assert t.rollouts["retrieval"].counts == {"dropped_lines": 1}
    assert len(t.memory) == 3  # all of it can still be searched
    with_nothing = run_pipeline(agents, [QUESTION], fits=lambda name, task: False)[0]
    assert with_nothing.rollouts["profile"].counts == {"dropped_entries": 3}


@pytest.mark.parametrize(
    ("written", "options", "counts"),
    [
        ("<answer>milk</answer>", ("tea", "coffee"), {"unreadable_answers": 1}),
        ("<answer>milk</answer>", (), {}),
        ("<answer> </answer>", ("tea", "coffee"), {}),
        ("milk", ("tea", "coffee"), {}),
    ],
)
def test_an_answer_that_chooses_no_option_is_counted(written, options, counts):
    agents = Scripts(extraction="no", profile="no", retrieval=written)
    (t,) = run_pipeline(agents, [replace(QUESTION, options=options)])
    assert t.rollouts["retrieval"].counts == counts
    if counts:
        assert t.rollouts["retrieval"].answer == "milk"


def test_the_text_of_a_special_token_ends_no_run(monkeypatch):
    """A chat template would feed it as that token, so that it is left out of the next agent's prompt, and counted."""
    config, parts = memory_config("environment.prompt=chat"), models()
    for agent in parts.agents.values():
        monkeypatch.setattr(agent.tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    question = parts.dataset.train[0]
    script = MemoryScript("[1] tea <|end|>\n[2] judo", "drink: <|end|>\nsport: judo\n<|end|>", "tea", "judo")
    (t,) = memory._run(config, parts, memory.scripted(config, parts, [script]), [question])
    assert "<|end|>" in t.memory[0].text  # which can still be searched
    assert t.profile.count("<|end|>") == 2
    prompts = {
        name: decode(parts.agents[name].tokenizer, rollout.tokens[: rollout.prompt_length])
        for name, rollout in t.rollouts.items()
    }
    assert prompts["profile"].endswith("Notes:\n[2] judo\n")
    assert "Profile:\nsport: judo\nQuestion" in prompts["retrieval"]
    assert t.rollouts["profile"].counts["special_entries"] == 1
    assert t.rollouts["retrieval"].counts["special_lines"] == 2
    assert "dropped_entries" not in t.rollouts["profile"].counts
    plain = memory_config()
    (t,) = memory._run(plain, parts, memory.scripted(plain, parts, [script]), [question])
    assert "special_entries" not in t.rollouts["profile"].counts  # there it is text


@pytest.mark.parametrize(
    ("setting", "agent"),
    [
        ("memory.extraction_tokens", "extraction"),
        ("memory.profile_tokens", "profile"),
        ("sampling.max_turn_tokens", "retrieval"),
        ("sampling.max_answer_tokens", "retrieval"),
    ],
)
def test_scripts_that_an_agent_could_not_write_are_counted(setting, agent):
    parts = models()
    questions = parts.dataset.train[:3]
    scripts = memory_scripts(questions, 1.0)
    long = dict.fromkeys(("memory.extraction_tokens", "memory.profile_tokens"), 400) | dict.fromkeys(
        ("sampling.max_turn_tokens", "sampling.max_answer_tokens"), 60
    )
    for changed, expected in (({}, set()), ({setting: 3}, {agent})):
        config = memory_config(*(f"{name}={tokens}" for name, tokens in (long | changed).items()))
        trajectories = memory._run(config, parts, memory.scripted(config, parts, scripts), questions)
        for t in trajectories:
            assert {n for n, r in t.rollouts.items() if r.counts.get("long_scripts")} == expected


# Judges


def test_a_judge_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text("def half(profiles, conversations):\n    return [0.5 for _ in profiles]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert judged(load_judge("my_judges:half"), ["x"], [TALK]) == [0.5]
    assert load_judge("facts") is facts
    for name, message in (
        ("half", "'facts' or 'module:function', got 'half'"),
        ("my_judges:third", "no function 'third'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_judge(name)
    with pytest.raises(ImportError, match="my_missing"):
        load_judge("my_missing:half")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.5], r"score of conversation 'c' must be in \[0, 1\], got 1.5"),
        ([float("nan")], "got nan"),
        ([], "0 scores for 1"),
        (None, "memory.judge gave None, not a list of scores"),
        (0.5, "memory.judge gave 0.5, not a list of scores"),
        ("1", "memory.judge gave '1', not a list of scores"),
        (["good"], r"memory.judge gave \['good'\], not a list of scores"),
    ],
)
def test_scores_of_a_judge_are_checked(scores, message):
    with pytest.raises(ValueError, match=message):
        judged(lambda texts, talks: scores, ["x"], [TALK])
