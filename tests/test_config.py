from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass, replace

import pytest

from stepcredit.credit import METHODS, IGSearch, SearchR1
from stepcredit.train.config import DataConfig, EnvironmentConfig, TrainConfig
from stepcredit.train.overrides import apply_overrides, field_docs, flatten, from_json, to_json
from stepcredit.train.recipes import RECIPES, get_recipe
from stepcredit.train.update_config import OptimizerConfig


def override(*overrides):
    return apply_overrides(TrainConfig(), overrides)


def test_values_are_parsed_by_type():
    config = override(
        "steps=3",
        "optimizer.learning_rate=2e-5",
        "environment.force_answer=false",
        "environment.passage_words=40",
        "loss.aggregation=sequence",
        "data.datasets=2wiki, musique",
        "output_dir=a=b",
        "credit.soft_clip=inf",
        "warm_start.mix.good=1",
        "warm_start.mix.question=0",
        "warm_start.mix.one_hop=0",
        "warm_start.mix.repeat=0",
        "data.questions=q.jsonl",
        "data.corpus=c.jsonl",
    )
    assert config.steps == 3
    assert config.optimizer.learning_rate == 2e-5
    assert config.environment == replace(TrainConfig().environment, force_answer=False, passage_words=40)
    assert config.loss.aggregation == "sequence"
    assert config.data.datasets == ("2wiki", "musique")
    assert config.output_dir == "a=b"
    assert config.credit == IGSearch(soft_clip=math.inf)
    assert config.warm_start.mix.good == 1.0


def test_none_and_the_last_value_win():
    config = override("environment.passage_words=40", "environment.passage_words=none", "steps=1", "steps=2")
    assert config.environment.passage_words is None
    assert config.steps == 2


def test_the_credit_method_is_chosen_by_name_and_keeps_its_fields_in_any_order():
    assert override("credit.eps=1e-3", "credit=search_r1").credit == SearchR1(eps=1e-3)
    assert override("credit=ig_search_code", "credit.alpha=0").credit == replace(IGSearch.code(), alpha=0.0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("stps=3", r"unknown field 'stps'; did you mean 'steps'\?"),
        ("credt.alpha=1", r"did you mean 'credit\.alpha'\?"),
        ("alpha=1", r"did you mean 'credit\.alpha'\?"),
        ("optimizer.learning_rat=1", r"did you mean 'optimizer\.learning_rate'\?"),
        ("learning_rates=1", r"did you mean '\w+\.learning_rate'\?"),
        ("model=tiny", r"unknown field 'model'"),
        ("steps", "expected field=value, got 'steps'"),
        ("steps=2.5", r"steps must be an integer, got '2\.5'"),
        ("optimizer.eps=small", "optimizer.eps must be a number, got 'small'"),
        ("environment.force_answer=yes", "environment.force_answer must be one of true, false, got 'yes'"),
        (
            "loss.aggregation=tokens",
            "loss.aggregation must be one of token, sequence, got 'tokens'; did you mean 'token'",
        ),
        ("credit=igsearch", r"unknown credit method 'igsearch'.*'ig_search'"),
        ("steps=-1", "steps must be at least 0, got -1"),
        ("sampling.temperature=0", r"sampling\.temperature must be positive.*0\.0"),
        ("sampling.top_p=2", r"sampling\.top_p must be in \(0, 1\], got 2\.0"),
        ("optimizer.learning_rate=nan", r"optimizer\.learning_rate must be at least 0\.0, got nan"),
        ("optimizer.beta1=1", r"optimizer\.beta1 must be in \[0, 1\), got 1\.0"),
        ("optimizer.max_grad_norm=0", r"optimizer\.max_grad_norm must be positive, got 0\.0"),
        ("environment.protocol=search_r2", r"'search_r2'.*'search_r1'"),
        ("environment.top_k=0", r"environment\.top_k must be at least 1, got 0"),
        ("environment.passage_words=0", r"environment\.passage_words must be at least 1, got 0"),
        (
            "data.questions=x.jsonl",
            r"data\.corpus must be a file or an index .* goes with 'x\.jsonl', got ''",
        ),
        (
            "environment.protocol=clarify",
            r"one that searches with data\.questions=atlas, got 'clarify'",
        ),
        (
            "data.questions=scenes",
            r"environment\.protocol must be clarify with data.*=scenes, got 'search_r1'",
        ),
        ("rewards.iou=1", r"rewards\.iou must be 0 without data\.questions=scenes, got 1"),
        ("data.corpus=c.jsonl", r"data\.corpus must be empty with data\.questions=atlas, got 'c\.jsonl'"),
        ("loss.minibatches=49", r"loss\.minibatches must be at most the 48 rollouts of a step, got 49"),
        ("warm_start.mix.good=0.9", r"must sum to 1"),
        ("model.name= ", r"model\.name must be a model, got ' '"),
    ],
)
def test_bad_overrides_name_field_and_value(bad, message):
    with pytest.raises(ValueError, match=message):
        override(bad)


def test_scenes_have_one_episode():
    with pytest.raises(ValueError, match=r"environment\.episodes must be 1 with data\.questions=scenes, got 2"):
        override("data.questions=scenes", "environment.protocol=clarify", "environment.episodes=2")


def test_a_field_of_another_method_is_unknown():
    with pytest.raises(ValueError, match=r"unknown field 'credit\.alpha'"):
        override("credit=search_r1", "credit.alpha=1")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_json_gives_the_configuration_back(recipe, method):
    config = apply_overrides(get_recipe(recipe), [f"credit={method}", "data.seed=7"])
    if hasattr(config.credit, "soft_clip"):
        config = apply_overrides(config, ["credit.soft_clip=inf"])
    text = json.dumps(to_json(config), allow_nan=False)
    assert from_json(json.loads(text)) == config


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown recipe 'quickstrat'.*did you mean 'quickstart'\?"):
        get_recipe("quickstrat")


def groups(config):
    yield type(config)
    for f in fields(config):
        if is_dataclass(value := getattr(config, f.name)):
            yield from groups(value)


@pytest.mark.parametrize("cls", [*groups(TrainConfig()), *{type(make()) for make in METHODS.values()}])
def test_every_field_is_documented(cls):
    docs = field_docs(cls)
    leaves = [f.name for f in fields(cls) if not is_dataclass(getattr(cls(), f.name))]
    assert [name for name in leaves if not docs.get(name)] == []
    assert set(docs) <= {f.name for f in fields(cls)}


def test_documentation_is_joined_over_lines_and_shared_by_names():
    assert field_docs(OptimizerConfig)["beta2"] == "as in torch.optim.AdamW."
    assert field_docs(TrainConfig)["checkpoint_every"].endswith("0 keeps the final weights only.")


def test_flat_names_are_unique_and_groups_are_frozen():
    assert flatten(TrainConfig())["warm_start.mix.good"] == 0.4
    with pytest.raises(AttributeError):
        TrainConfig().steps = 3  # type: ignore[misc]


def test_the_learning_rate_rises_linearly():
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=3)
    assert [optimizer.rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert OptimizerConfig(learning_rate=1.0).rate(0) == 1.0


def test_groups_validate_when_built_directly():
    with pytest.raises(ValueError, match=r"environment\.max_searches must be at least 0, got -1"):
        EnvironmentConfig(max_searches=-1)
    with pytest.raises(ValueError, match=r"data\.corpus"):
        DataConfig(questions="q.jsonl")
