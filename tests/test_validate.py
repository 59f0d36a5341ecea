from __future__ import annotations

import math

import pytest

from stepcredit.credit import IGSearch, SearchR1
from stepcredit.train.config import EvaluationConfig, TrainConfig
from stepcredit.train.overrides import apply_overrides
from stepcredit.train.recipes import get_recipe
from stepcredit.train.setup import load_data
from stepcredit.train.update_config import LossConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IGSearch(num_random=0), r"credit.num_random must be at least 1, got 0"),
        (lambda: IGSearch(alpha=math.nan), r"credit.alpha must be finite, got nan"),
        (lambda: IGSearch(soft_clip=0.0), r"credit.soft_clip must be positive, got 0.0"),
        (lambda: IGSearch(max_context=0), r"credit.max_context must be at least 1, got 0"),
        (lambda: IGSearch(center="mean"), r"credit.center must be one of none, batch, group, got 'mean'"),
        (lambda: SearchR1(eps=-3.0), r"credit.eps must be at least 0, got -3.0"),
        (lambda: SearchR1(scale="max"), r"credit.scale must be one of std, none, got 'max'"),
        (lambda: LossConfig(aggregation="mean"), r"loss.aggregation must be one of token, sequence, got 'mean'"),
        (lambda: EvaluationConfig(split="trian"), r"evaluation.split must be one of dev, test, got 'trian'"),
    ],
)
def test_a_bad_constant_is_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_naming_the_method_a_recipe_has_keeps_the_recipes_constants():
    recipe = get_recipe("quickstart")
    assert apply_overrides(recipe, ["credit=ig_search"]) == recipe
    assert apply_overrides(recipe, ["credit=search_r1"]).credit == SearchR1()
    assert apply_overrides(recipe, ["credit=ig_search_paper"]).credit == IGSearch.paper()


def test_a_recipe_without_data_of_its_own_asks_for_it():
    with pytest.raises(ValueError, match=r"data.questions is empty: .* data.questions=... data.corpus=..."):
        load_data(get_recipe("smollm2").data)
    assert isinstance(get_recipe("smollm2"), TrainConfig)
