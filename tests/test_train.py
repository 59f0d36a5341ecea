from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from stepcredit.batch import RolloutBatch
from stepcredit.credit import METHODS, Credit, IGSearch, SearchR1
from stepcredit.rollout import SpanKind
from stepcredit.train import __main__ as command
from stepcredit.train import progress
from stepcredit.train.config import TrainConfig
from stepcredit.train.draws import derive_seed, questions_of_step
from stepcredit.train.loop import train
from stepcredit.train.metrics import documented
from stepcredit.train.overrides import flatten
from stepcredit.train.policy import policy_logprobs, resolve_dtype
from stepcredit.train.recipes import RECIPES
from stepcredit.train.rows import pack_rows, used_lengths
from stepcredit.train.setup import frozen_copy
from stepcredit.train.summary import summary_line
from stepcredit.train.update import policy_update, share_weights
from stepcredit.train.update_config import LossConfig
from tiny_run import gradients, played, same, tiny_config, tiny_parts

SUMMARY = (
    "em_before em_after em_sampled_before em_sampled_after f1_before f1_after hit_before hit_after hit_sampled_before "
    "hit_sampled_after finished_before finished_after seconds steps tokens_forwarded ig_seconds_share seed"
)


def update(credit, loss=None, **kwargs):
    """Gradients, metrics and parts of one update on the same batch and policy."""
    parts = tiny_parts()
    seen = []
    parts.optimizer.step = lambda rate: seen.append(gradients(parts.optimizer)) or 1.0
    batch = played(parts, 8, group_size=4)
    metrics = policy_update(
        parts.scorer, parts.optimizer, batch, credit, loss or LossConfig(), learning_rate=0.0, temperature=1.0, **kwargs
    )
    return seen, metrics


def credit_of(method=None):
    parts = tiny_parts()
    batch = played(parts, 8, group_size=4)
    return (method or IGSearch(center="batch"))(batch, parts.scorer, step=1), batch


# The whole command


def test_the_command_runs_end_to_end(tmp_path, capsys):
    words = ["tiny", f"output_dir={tmp_path}", "evaluation.questions=4", "warm_start.steps=30", "checkpoint_every=1"]
    assert command.main(words) == 0
    out = capsys.readouterr().out
    last = out.strip().splitlines()[-1]
    assert re.fullmatch(
        r"held-out EM [\d.]+ -> [\d.]+ \(sampled [\d.]+ -> [\d.]+\), gold passages [\d.]+ -> [\d.]+, 2 steps, \d+ s",
        last,
    )
    assert "GeoNames" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert " ".join(summary) == SUMMARY
    assert summary["steps"] == 2
    assert summary["tokens_forwarded"] > 1000
    assert 0 < summary["ig_seconds_share"] < 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    phases = ["data", *["warm_start"] * 30, "evaluation", "grpo", "grpo", "evaluation"]
    assert [line["phase"] for line in lines] == phases
    assert summary["tokens_forwarded"] == sum(line["tokens_forwarded"] for line in lines[1:])
    undocumented = {name for line in lines for name in line if not documented(name)}
    assert undocumented == set()
    # the first batch is audited against separate forwards
    assert [line.get("ig/audit_difference", 1) < 1e-5 for line in lines[-3:-1]] == [True, False]
    for line in lines[-3:-1]:
        assert line["ig/scored"] + sum(v for k, v in line.items() if k.startswith("ig/unscored")) == line["ig/steps"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["recipe"] == "tiny"
    assert config["credit"] == "ig_search"
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert {f.name for f in (tmp_path / "model").iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    # and goes on from its checkpoint
    assert command.main(["--resume", str(tmp_path), "steps=3"]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tinny"], "unknown recipe 'tinny'.*did you mean 'tiny'"),
        (["tiny", "stps=1"], "unknown field 'stps'; did you mean 'steps'"),
        (["tiny", "steps=x"], "steps must be an integer, got 'x'"),
        (["tiny", "--resume", "nowhere"], "nowhere: there is no config.json"),
        (["tiny", "data.questions=nowhere.jsonl", "data.corpus=nowhere.jsonl"], "nowhere.jsonl"),
        (["tiny", "model.name=./nowhere"], "nowhere"),
        (["tiny", "model.device=warp"], "model.device.*'warp'"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(words) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert len(captured.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_bad_line_of_the_corpus_is_named(capsys, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"id": "1", "title": "t", "text": "x"}\n{"id": "2", "title": "t"}\n')
    (tmp_path / "q.jsonl").write_text("")
    words = ["tiny", f"data.questions={tmp_path}/q.jsonl", f"data.corpus={tmp_path}/c.jsonl"]
    assert command.main(words) == 2
    assert "c.jsonl:2: field 'text' is missing" in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten(capsys, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert command.main(["tiny", f"output_dir={tmp_path}"]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_the_help_teaches(capsys):
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in [*RECIPES, *METHODS, *flatten(TrainConfig()), "--resume"]:
        assert name in out
    assert command.main(["tiny", "--help"]) == 0
    assert "model.name=tiny" in capsys.readouterr().out


# Credit into gradients


def test_alpha_zero_is_search_r1_bit_for_bit(tmp_path):
    models, norms = [], []
    for method in (["credit=ig_search", "credit.alpha=0"], ["credit=search_r1"]):
        directory = tmp_path / method[0]
        directory.mkdir()
        parts = tiny_parts(searching=True)
        train(tiny_config(*method), parts, directory)
        models.append(parts.model.state_dict())
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        norms.append([json.loads(line).get("grad_norm", 0) for line in lines])
    assert same(*models)
    assert norms[0] == norms[1]
    assert any(norms[0])


def test_skipping_what_has_no_advantage_gives_identical_gradients():
    credit, batch = credit_of(SearchR1())
    assert sum(bool((a == 0).all()) for a in credit.advantages.split(torch.diff(batch.cu_seqlens).tolist())) == 4
    (skipping,), metrics = update(credit)
    # An advantage too small to matter, on every policy token, makes every rollout run to its end.
    tiny = torch.where(batch.policy_mask & (credit.advantages == 0), 1e-30, credit.advantages)
    (running,), full = update(replace(credit, advantages=tiny))
    assert (metrics["skipped_zero_advantage"], full["skipped_zero_advantage"]) == (4, 0)
    assert metrics["tokens_forwarded"] < full["tokens_forwarded"]
    for name, gradient in running.items():
        torch.testing.assert_close(skipping[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_rollout_is_run_to_its_last_token_with_an_advantage():
    credit, batch = credit_of()
    queries = torch.where(batch.step_ids >= 0, torch.ones_like(credit.advantages), 0)
    (one,), metrics = update(Credit(queries))
    last = [max(s.stop for s in r.spans if s.kind is SpanKind.QUERY) for r in batch.rollouts]
    prefixes = {
        (r.group, *r.tokens[:n]) for r, stop in zip(batch.rollouts, last, strict=True) for n in range(1, stop + 1)
    }
    assert metrics["tokens_forwarded"] == len(prefixes) < sum(last) < batch.tokens.numel()
    tiny = torch.where(batch.policy_mask & (queries == 0), 1e-30, queries)
    (other,), _ = update(Credit(tiny))
    for name, gradient in other.items():
        torch.testing.assert_close(one[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_gradient_is_that_of_the_formula(aggregation):
    """Against a padded forward over everything, full logits, and the loss written out."""
    credit, batch = credit_of()
    (mine,), metrics = update(credit, LossConfig(aggregation=aggregation))
    model = frozen_copy(tiny_parts().model).requires_grad_()
    ids = batch.padded(batch.tokens, fill=0).long()
    mask = batch.padded(batch.policy_mask.float()).bool()
    advantages = batch.padded(credit.advantages)
    logp = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    terms = -(logp - logp.detach()).exp() * advantages[:, 1:] * mask[:, 1:]
    loss = terms.sum() / mask.sum() if aggregation == "token" else (terms.sum(1) / mask.sum(1)).mean()
    loss.backward()
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-3, atol=1e-7)


def test_the_gradient_does_not_depend_on_micro_batches():
    credit, _ = credit_of()
    (whole,), _ = update(credit, LossConfig(max_tokens=10**6))
    (pieces,), _ = update(credit, LossConfig(max_tokens=1))
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-7)


def test_minibatches_are_normalised_on_their_own_and_epochs_repeat_them():
    credit, batch = credit_of()
    for aggregation in ("token", "sequence"):
        weights = share_weights(batch, [4, 5, 6, 7], aggregation)
        assert float(weights.sum()) == pytest.approx(1)
        assert (weights[: batch.cu_seqlens[4]] == 0).all()
    seen, metrics = update(credit, LossConfig(minibatches=2, epochs=2))
    assert len(seen) == 4
    assert metrics["optimizer_steps"] == 4
    # the log-probs of the sampling policy cost one more pass, without what follows the last token of a question
    assert 3 * update(credit)[1]["tokens_forwarded"] - 8 <= metrics["tokens_forwarded"]
    assert metrics["tokens_forwarded"] < 3 * update(credit)[1]["tokens_forwarded"]


def test_the_scoring_pass_gives_the_old_log_probs():
    """Folded: the same gradients, and the pass over the sampling policy's log-probs is saved."""
    parts = tiny_parts()
    batch = played(parts, 8, group_size=4)
    folded = IGSearch(center="batch")(batch, parts.scorer, step=1, temperature=1.0)
    plain = replace(folded, logprobs=None)
    loss = LossConfig(minibatches=2, epochs=2)
    (seen, metrics), (expected, full) = update(folded, loss), update(plain, loss)
    for one, other in zip(seen, expected, strict=True):
        for name, gradient in other.items():
            torch.testing.assert_close(one[name], gradient, rtol=1e-3, atol=1e-6)
    assert metrics["tokens_forwarded"] == 2 * update(plain)[1]["tokens_forwarded"] < full["tokens_forwarded"]
    assert metrics["old_logprob_gap"] < 1e-5
    assert "old_logprob_gap" not in update(folded)[1]  # one optimizer step has no use for old log-probs
    apart = replace(folded, logprobs=folded.logprobs - 0.1)
    assert update(apart, loss)[1]["old_logprob_gap"] == pytest.approx(0.1, abs=1e-4)
    assert SearchR1()(batch, parts.scorer, temperature=1.0).logprobs is None
    assert IGSearch(trunk="skeleton")(batch, parts.scorer, temperature=1.0).logprobs is None


def test_later_optimizer_steps_see_another_ratio():
    parts = tiny_parts()
    batch = played(parts, 8, group_size=4)
    credit = SearchR1()(batch, parts.scorer)
    metrics = policy_update(
        parts.scorer, parts.optimizer, batch, credit, LossConfig(epochs=3), learning_rate=1e-2, temperature=1.0
    )
    assert metrics["clip_fraction"] > 0


def test_kl_is_to_the_reference_and_runs_every_rollout():
    credit, _ = credit_of(SearchR1())
    same_policy = tiny_parts().scorer
    (with_kl,), metrics = update(credit, LossConfig(kl_coef=0.5), reference=same_policy)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["skipped_zero_advantage"] == 0
    with torch.no_grad():
        same_policy.model.model.norm.weight.mul_(1.5)
    (other,), metrics = update(credit, LossConfig(kl_coef=0.5), reference=same_policy)
    assert metrics["kl"] > 1e-4
    assert not same(with_kl, other)


def test_a_batch_without_advantages_changes_nothing():
    credit, batch = credit_of()
    parts = tiny_parts()
    before = {k: v.clone() for k, v in parts.optimizer.state().items()}
    nothing = Credit(torch.zeros_like(credit.advantages))
    metrics = policy_update(
        parts.scorer, parts.optimizer, batch, nothing, LossConfig(), learning_rate=1.0, temperature=1.0
    )
    assert metrics["optimizer_steps"] == 0
    assert metrics["skipped_zero_advantage"] == len(batch)
    assert metrics["tokens_forwarded"] == 0
    assert same(before, parts.optimizer.state())


def test_nan_weights_are_an_error_that_names_the_question(tmp_path):
    credit, batch = credit_of()
    parts = tiny_parts()
    with torch.no_grad():
        parts.model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"hidden states are not finite for question 'atlas:"):
        policy_update(parts.scorer, parts.optimizer, batch, credit, LossConfig(), learning_rate=1.0, temperature=1.0)
    with pytest.raises(FloatingPointError, match=r"question 'atlas:"):
        train(tiny_config("warm_start.steps=0"), parts, tmp_path)


def test_logprobs_of_training_are_those_of_sampling_at_any_temperature():
    parts = tiny_parts()
    config = tiny_config("sampling.temperature=0.7")
    rollouts = parts.engine.rollout(
        parts.dataset.train[:3], parts.environment, config.sampling.build(seed=1), group_size=2
    )
    for rollout in rollouts:
        rollout.rewards["total"] = 0.0
    batch = RolloutBatch.pack(rollouts)
    rows = pack_rows(batch, used_lengths(batch, batch.policy_mask), 512)
    position, logprobs = policy_logprobs(parts.model, batch, batch.policy_mask, rows, 0.7)
    assert position.numel() == int(batch.policy_mask.sum())
    torch.testing.assert_close(logprobs.detach(), batch.sampling_logprobs[position], rtol=0, atol=2e-5)


# Small parts


def test_questions_come_from_shuffled_epochs():
    questions = tiny_parts().dataset.train[:10]
    steps = [questions_of_step(questions, 4, 3, step) for step in range(5)]
    flat = [q.id for step in steps for q in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == sorted(q.id for q in questions)
    assert flat[:10] != flat[10:]
    assert questions_of_step(questions, 4, 3, 2) == steps[2]
    assert questions_of_step(questions, 4, 4, 2) != steps[2]


def test_seeds_depend_on_their_purpose():
    seeds = {derive_seed(s, purpose, k) for s in range(3) for purpose in ("rollout", "credit") for k in range(5)}
    assert len(seeds) == 30
    assert derive_seed(1, "rollout", 2) == derive_seed(1, "rollout", 2)


def test_compute_dtype():
    assert resolve_dtype("float32", torch.device("cpu")) is torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    assert resolve_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)


def test_the_summary_line_shows_what_was_not_measured():
    summary = dict.fromkeys(SUMMARY.split(), None) | {
        "em_before": 0.275,
        "em_after": 0.41,
        "steps": 12,
        "seconds": 430.6,
    }
    assert summary_line(summary) == ("held-out EM 27.5 -> 41.0 (sampled - -> -), gold passages - -> -, 12 steps, 431 s")


def test_progress_is_plain_lines_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    reporter = progress.Reporter(Console(force_terminal=False))
    with reporter.task("outer", 2) as outer:
        with reporter.task("inner", 1) as inner:
            inner()
        outer(1, "EM 3")
        outer(1, "[EM] 4")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["outer: 1/2 EM 3", "outer: 2/2 in 0 s [EM] 4"]


def test_progress_is_bars_in_a_terminal():
    console = Console(force_terminal=True, width=120, file=io.StringIO(), record=True)
    with progress.Reporter(console).task("outer", 2) as outer:
        outer(2, "[EM] 4")
    text = console.export_text()
    assert "2/2" in text
    assert "[EM] 4" in text
