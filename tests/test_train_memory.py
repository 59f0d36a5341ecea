"""Training of a memory pipeline: three adapters or three models, one joint step, checkpoints, the command."""

from __future__ import annotations

import itertools
import json
import math
import re
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM

from memory_run import WORDS, base, fresh_parts, made_up_rewards, memory_config, models
from stepcredit.batch import RolloutBatch
from stepcredit.credit import CoMAM, SearchR1
from stepcredit.environments.memory import AGENTS
from stepcredit.train import __main__ as command
from stepcredit.train import memory, memory_setup
from stepcredit.train import summary as run_summary
from stepcredit.train.checkpoint import State, load_checkpoint
from stepcredit.train.memory import train_memory, train_step
from stepcredit.train.memory_setup import build_memory
from stepcredit.train.metrics import MetricsLog, documented
from stepcredit.train.overrides import apply_overrides, to_json
from stepcredit.train.pipeline import assign_pipeline_rewards
from stepcredit.train.progress import Reporter
from stepcredit.train.recipes import comam
from stepcredit.train.setup import build
from tiny_run import same, tiny_config

TIMED = ("seconds",)


@pytest.fixture
def rewarded(monkeypatch):
    """Agents earn something for whatever they write. Curves take half of a run's time here, and are not drawn."""
    monkeypatch.setattr(memory, "assign_pipeline_rewards", made_up_rewards)
    monkeypatch.setattr(run_summary, "draw_curves", lambda metrics, path: "")


def run(directory, *overrides, resume=False):
    directory.mkdir(exist_ok=True)
    config, parts = fresh_parts("checkpoint_every=1", "evaluation.questions=1", *overrides)
    summary = train_memory(config, parts, directory, resume=resume)
    return parts, summary


def untimed(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines]


def steps(directory):
    return [line for line in untimed(directory) if line["phase"] == "grpo"]


def states(parts):
    """The tensors of every optimizer, copied."""
    return {n: {k: v.clone() for k, v in a.optimizer.state().items()} for n, a in parts.agents.items()}


@pytest.mark.parametrize("agents", ["adapters", "models"])
def test_one_and_one_step_are_two_bit_for_bit(tmp_path, agents, rewarded):
    words = [f"memory.agents={agents}"]
    if agents == "models":
        words += ["model.name=smollm2", f"memory.models={base()},{base()},{base()}"]  # the name is not read
    whole, summary = run(tmp_path / "whole", "steps=2", *words)
    run(tmp_path / "parts", "steps=1", *words)
    resumed, resumed_summary = run(tmp_path / "parts", "steps=2", *words, resume=True)
    for name in AGENTS:
        assert same(whole.agents[name].optimizer.state(), resumed.agents[name].optimizer.state())
        assert same(whole.agents[name].model.state_dict(), resumed.agents[name].model.state_dict())
        assert (tmp_path / f"parts/checkpoint/optimizer.{name}.safetensors").is_file()
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")
    assert {k: v for k, v in summary.items() if k != "seconds"} == {
        k: v for k, v in resumed_summary.items() if k != "seconds"
    }
    lines = steps(tmp_path / "whole")
    assert len(lines) == 2
    for line in lines:
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
        assert [key for key in line if not documented(key)] == []
        assert sum(line[f"comam/weight_{name}"] for name in AGENTS) == pytest.approx(1.0)
        assert line["logprob_gap"] < 1e-4
    for name in AGENTS:
        assert all(line[f"grad_norm_{name}"] > 0 for line in lines), name
    if agents == "models":
        places = [base(), *(tmp_path / "whole/agents" / name for name in AGENTS)]
        weights = [AutoModelForCausalLM.from_pretrained(place).state_dict() for place in places]
        assert not any(same(*pair) for pair in itertools.combinations(weights, 2))


def test_adapters_learn_apart_and_the_model_stays_as_it_is(rewarded):
    config, parts = fresh_parts()
    agents = list(parts.agents.values())
    assert len({id(agent.model) for agent in agents}) == 1
    names = [set(agent.optimizer.parameters) for agent in agents]
    assert all(f".{agent.name}." in name for agent, own in zip(agents, names, strict=True) for name in own)
    frozen = {k: v.clone() for k, v in agents[0].model.state_dict().items() if "lora" not in k}
    before = states(parts)
    lines = [train_step(config, parts, State(), step) for step in range(2)]
    assert same(frozen, {k: v for k, v in agents[0].model.state_dict().items() if "lora" not in k})
    trained = AutoModelForCausalLM.from_pretrained(base())
    for name, weight in trained.named_parameters():
        stored = next(v for k, v in frozen.items() if k.replace(".base_layer", "") == name)
        assert torch.equal(weight, stored)
    for agent in agents:
        moved = any(line[f"grad_norm_{agent.name}"] > 0 for line in lines)
        assert moved
        after = agent.optimizer.state()
        assert not same(before[agent.name], {k: after[k] for k in before[agent.name]})


def test_one_agents_update_leaves_the_others_alone(monkeypatch, rewarded):
    config, parts = fresh_parts()
    seen = []
    update = memory.policy_update

    def spy(scorer, optimizer, batch, *args, **kwargs):
        before = states(parts)
        result = update(scorer, optimizer, batch, *args, **kwargs)
        after = states(parts)
        changed = [n for n in AGENTS if not same(before[n], {k: after[n][k] for k in before[n]})]
        seen.append(({r.agent for r in batch.rollouts}, changed, result["grad_norm"]))
        return result

    monkeypatch.setattr(memory, "policy_update", spy)
    for step in range(2):
        train_step(config, parts, State(), step)
    assert [agents for agents, _, _ in seen] == [{name} for name in AGENTS] * 2
    for agents, changed, norm in seen:
        assert changed == (list(agents) if norm else [])
    assert any(changed for _, changed, _ in seen)


def test_no_token_of_the_environment_has_an_advantage(monkeypatch, rewarded):
    config, parts = fresh_parts()
    seen = []
    update = memory.policy_update

    def spy(scorer, optimizer, batch, credit, *args, **kwargs):
        seen.append((batch, credit))
        return update(scorer, optimizer, batch, credit, *args, **kwargs)

    monkeypatch.setattr(memory, "policy_update", spy)
    train_step(config, parts, State(), 0)
    assert len(seen) == 3
    for batch, credit in seen:
        assert not credit.advantages[~batch.policy_mask].any()
        for rollout, at in zip(batch.rollouts, batch.cu_seqlens.tolist(), strict=False):
            assert not batch.policy_mask[at : at + rollout.prompt_length].any()
            rollout.validate()
    assert any(credit.advantages.any() for _, credit in seen)
    # Credited together, an agent's advantages are those of its own rollouts credited with the other agents' weights.
    together = RolloutBatch.pack([r for batch, _ in seen for r in batch.rollouts])
    assert torch.equal(CoMAM()(together).advantages, torch.cat([credit.advantages for _, credit in seen]))
    for batch, _ in seen:
        assert torch.equal(CoMAM(reward="global")(batch).advantages, SearchR1()(batch, None).advantages)


def test_twenty_steps_teach_every_agent_its_own_reward_and_the_pipeline_its(monkeypatch):
    """Each agent is paid for words of its own, the pipeline for what the retrieval agent is paid for: all rewards rise,
    and the retrieval agent, whose reward ranks the trajectories as the pipeline's does, has the largest weight."""
    wanted = {name: number for number, name in enumerate(AGENTS)}

    def paid(trajectories, settings, judge):
        assign_pipeline_rewards(trajectories, settings, judge)
        for t in trajectories:
            for name, rollout in t.rollouts.items():
                ids = [i for s in rollout.spans if s.by_policy for i in rollout.tokens[s.start : s.stop]]
                rollout.rewards["local"] = fmean(i % len(AGENTS) == wanted[name] for i in ids)
            right = float(t.rollouts["retrieval"].rewards["local"] > 0.5)
            for rollout in t.rollouts.values():
                rollout.rewards["total"] = right

    monkeypatch.setattr(memory, "assign_pipeline_rewards", paid)
    config, parts = fresh_parts("memory.agents=models", "optimizer.learning_rate=0.05")
    lines = [train_step(config, parts, State(), step) for step in range(20)]
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    for name in ("reward", *(f"comam/reward_{agent}" for agent in AGENTS)):
        first, last = (fmean(line[name] for line in some) for some in (lines[:4], lines[-4:]))
        assert last > first + 0.4, (name, first, last)
    undecided = [line for line in lines if 0 < line["reward"] < 1]
    weights = {agent: fmean(line[f"comam/weight_{agent}"] for line in undecided) for agent in AGENTS}
    assert max(weights, key=weights.__getitem__) == "retrieval"


def test_the_agents_that_are_written_are_those_that_were_trained(tmp_path, rewarded):
    from peft import PeftModel

    parts, summary = run(tmp_path, "credit.weights=uniform", "evaluation.samples=1")
    assert summary["steps"] == 2
    assert summary["em_sampled_after"] is not None
    ids = torch.tensor([[5, 9, 300, 17, 4]])
    outputs = []
    for name, agent in parts.agents.items():
        agent.activate()
        with torch.no_grad():
            outputs.append(agent.model(ids).logits)
            plain = AutoModelForCausalLM.from_pretrained(base())
            written = PeftModel.from_pretrained(plain, tmp_path / "agents" / name).eval()
            torch.testing.assert_close(written(ids).logits, outputs[-1], rtol=1e-5, atol=1e-6)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    with pytest.raises(ValueError, match=r"other agents: it has no optimizer\.other\.safetensors"):
        load_checkpoint(tmp_path / "checkpoint", {"other": parts.agents["profile"].optimizer})


def test_the_command_runs_a_warm_start_and_goes_on(tmp_path, capsys):
    words = [
        "comam",
        *WORDS,
        "memory.agents=models",
        f"output_dir={tmp_path}",
        "warm_start.steps=3",
        "warm_start.batch=4",
    ]
    assert command.main([*words, "checkpoint_every=1", "steps=1"]) == 0
    assert re.search(r"held-out EM [\d.]+ -> [\d.]+ ", capsys.readouterr().out)
    lines = untimed(tmp_path)
    assert [line["phase"] for line in lines] == ["data", *["warm_start"] * 3, "evaluation", "grpo", "evaluation"]
    assert {name for line in lines for name in line if not documented(name)} == set()
    started = [line for line in lines if line["phase"] == "warm_start"]
    assert started[-1]["loss"] < started[0]["loss"]
    assert json.loads((tmp_path / "config.json").read_text())["credit"] == "comam"
    tokens = sum(line["tokens_forwarded"] for line in lines[1:])
    assert json.loads((tmp_path / "summary.json").read_text())["tokens_forwarded"] == tokens
    assert command.main(["--resume", str(tmp_path), "steps=2"]) == 0
    assert [line["step"] for line in steps(tmp_path)] == [1, 2]


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["credit=search_r1"], r"credit must be comam with memory.conversations, got 'SearchR1'"),
        (["data.questions=atlas"], r"data.questions must be empty with memory.conversations, got 'atlas'"),
        (["memory.extraction_tokens=2000"], r"conversation 'persona-.*' does not fit .* memory.extraction_tokens=2000"),
        (
            ["memory.profile_tokens=2047"],
            r"question 'persona-.*' does not fit the context of the profile agent's model, 2048 tokens, with "
            "memory.profile_tokens=2047",
        ),
        (["sampling.max_turn_tokens=2046"], r"question .* the retrieval agent's .* sampling.max_turn_tokens=2046"),
        (["memory.judge=mine"], r"memory.judge must be 'facts' or 'module:function', got 'mine'"),
        (["memory.personas.test=0"], r"memory.conversations='personas' has no test questions"),
    ],
)
def test_what_does_not_go_together_is_refused(words, message, monkeypatch):
    agents = models().agents  # built before that is replaced
    monkeypatch.setattr(memory_setup, "build_agents", lambda *_, **__: agents)
    with pytest.raises(ValueError, match=message):
        build_memory(memory_config(*words), Reporter())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        *(
            ([word], "memory.conversations")
            for word in (
                "data.seed=1",
                "data.retriever=hybrid",
                "rewards.em=1",
                "environment.protocol=refine",
                "environment.max_queries=1",
                "environment.episodes=2",
                "loss.kl_coef=0.1",
                "self_play.examiner_steps=1",
                "self_play.format=0.5",
                "warm_start.several=0",
                "warm_start.merged=0",
            )
        ),
        (["warm_start.mix.good=0.3", "warm_start.mix.repeat=0.3"], "memory.conversations"),
        (["memory.rank=4", "memory.agents=models"], "memory.agents=models"),
        (["memory.lora_alpha=4", "memory.agents=models"], "memory.agents=models"),
        (["model.name=tiny", "memory.agents=models", "memory.models=a,b,c"], "memory.models"),
        (["memory.personas.train=24", "memory.conversations=talks.jsonl"], "a file as memory.conversations"),
    ],
)
def test_a_setting_that_is_not_read_is_refused(words, reason):
    name = re.escape(words[0].partition("=")[0])
    with pytest.raises(
        ValueError, match=rf"{name} must be its default, .+, with {reason}, which does not read it, got"
    ):
        build_memory(memory_config(*words), Reporter())


def test_a_run_whose_settings_are_refused_now_is_told_what_to_delete(tmp_path, capsys, monkeypatch):
    settings = to_json(memory_config("data.seed=3", "rewards.em=0.5"))
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/state.json").write_text("{}")

    def resume():
        (tmp_path / "config.json").write_text(json.dumps(settings))
        assert command.main(["--resume", str(tmp_path)]) == 2
        return capsys.readouterr().err

    error = resume()
    for name, default, given in (("data.seed", "0", "3"), ("rewards.em", "0.0", "0.5")):
        assert f"{name} must be its default, {default}, with memory.conversations, which does not" in error
        assert f"got {given}" in error
    told = re.search(r"Leave out (.*?); where a run is resumed, delete them from its config\.json", error)
    assert told is not None
    assert told[1].split(", ") == ["data.seed=3", "rewards.em=0.5"]
    for word in told[1].split(", "):
        del settings[word.partition("=")[0]]

    def build_agents(*_, **__):
        raise ValueError("nothing else is refused")

    monkeypatch.setattr(memory_setup, "build_agents", build_agents)
    assert resume() == "error: nothing else is refused\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["memory.models=a,b"], r"memory.models must be the names of three models, or empty"),
        (["memory.models=a,b,c"], r"memory.models must be empty unless memory.agents is 'models'"),
        (["memory.good=2"], r"memory.good must be in \[0, 1\], got 2.0"),
        (["memory.rank=0"], r"memory.rank must be at least 1, got 0"),
        (["memory.lora_alpha=0"], r"memory.lora_alpha must be at least 1, got 0"),
    ],
)
def test_a_bad_field_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        memory_config(*words)


def test_comam_is_not_for_one_policy():
    with pytest.raises(ValueError, match=r"credit must be a method for one policy .* got 'comam'"):
        build(tiny_config("credit=comam"), Reporter())
    with pytest.raises(ValueError, match=r"memory.conversations must be empty for one policy .*, got 'personas'"):
        build(tiny_config("memory.conversations=personas"), Reporter())


def talks(path, said="I drink tea.", asked="Drink?", **fields):
    """A configuration with a file of two conversations."""
    record = {
        "id": "c1",
        "split": "train",
        "messages": [{"id": "1", "speaker": "user", "text": said}],
        "questions": [{"id": "q1", "question": asked, "answers": ["tea"], "evidence": ["1"]}],
        **fields,
    }
    held_out = {**record, "id": "c2", "split": "test", "questions": [{**record["questions"][0], "id": "q2"}]}
    path.write_text(json.dumps(record) + "\n" + json.dumps(held_out) + "\n")
    return apply_overrides(comam(), ["model.name=tiny", "model.device=cpu", f"memory.conversations={path}"])


def test_conversations_of_ones_own_need_facts_or_a_judge(tmp_path):
    with pytest.raises(ValueError, match=r"memory.judge=facts needs facts, which conversation 'c1' does not have"):
        build_memory(talks(tmp_path / "talks.jsonl"), Reporter())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"said": "tea <|end|>"}, r"conversation 'c1' holds '<\|end\|>', a special token of the extraction agent's"),
        (
            {"asked": "A <|end|>?"},
            r"question 'q1' holds '<\|end\|>', a special token of the retrieval agent's tokenizer",
        ),
    ],
)
def test_what_a_chat_template_would_feed_as_a_special_token_is_refused(tmp_path, monkeypatch, said, message):
    agents = models().agents
    for agent in agents.values():
        monkeypatch.setattr(agent.tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    monkeypatch.setattr(memory_setup, "build_agents", lambda *_, **__: agents)
    config = talks(tmp_path / "talks.jsonl", facts=[{"topic": "drink", "value": "tea"}], **said)
    assert set(build_memory(config, Reporter()).agents) == set(AGENTS)  # plain keeps it text
    with pytest.raises(ValueError, match=message):
        build_memory(apply_overrides(config, ["environment.prompt=chat"]), Reporter())


def test_a_warm_start_is_shown_what_its_agents_can_read_and_counts_what_they_cannot_write(tmp_path):
    _, parts = fresh_parts("memory.agents=models")
    config = memory_config("warm_start.steps=1", "warm_start.batch=2", "memory.profile_tokens=2030", "memory.good=1")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    memory.warm_start(config, parts, State(), log)
    (line,) = log.read()
    assert line["count_dropped_entries"] > 0
    assert line["count_long_scripts"] > 0
