"""`python -m stepcredit.score`: the gains of the Python call, window by window, through kills and bad arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

from score_lines import FORMS, four, in_tokens, many, quiet
from scripted_rollouts import REFINE, SEARCH_R1, random_policy, write
from stepcredit import Question, score_information_gain
from stepcredit.score import __main__ as command
from stepcredit.score import windows
from stepcredit.score.journal import Journal
from stepcredit.score.options import Options
from stepcredit.score.records import check_log
from stepcredit.scorer import PolicyScorer
from test_scoring import GOLDS, TOKENIZER, policy, rollouts
from tokenizers_under_test import BUILT

GAINS = jsonschema.Draft202012Validator(json.loads(command.schema_text("gains")))


def put(path: Path, lines) -> Path:
    path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        GAINS.validate(line)
    return lines


def score(directory: Path, lines, name="gains.jsonl", scorer=None, **options):
    """The parsed lines of the output, and what the run did."""
    log = check_log(put(directory / "rollouts.jsonl", lines), quiet())
    options = Options(**{"protocol": "refine", "window": 8, **options})
    scorer = scorer or PolicyScorer(policy(), TOKENIZER, options.protocol)
    progress = windows.score_log(log, directory / name, options, scorer, quiet())
    return read(directory / name), progress


def steps_of(lines):
    return [(b, step) for b, line in enumerate(lines) for step in line["steps"]]


def assert_gains(lines, gains, first=0):
    """That the lines say what `gains` holds; `first` is the line of its rollout 0."""
    steps = steps_of(lines)
    assert [(b, s["step"]) for b, s in steps] == list(zip(gains.rollout.tolist(), gains.step.tolist(), strict=True))
    for i, (_, step) in enumerate(steps):
        for name in ("gain", "real", "baseline"):
            value = np.nan if step[name] is None else step[name]
            np.testing.assert_array_equal(np.float32(value), getattr(gains, name)[i].numpy())
        row = gains.counterfactual[i].numpy()
        np.testing.assert_array_equal(np.float32(step["counterfactual"]), row[~np.isnan(row)])
        assert step["draws"] == [{"id": lines[b]["id"], "step": t} for b, t in gains.draws[i]]
        assert step["unscored"] == gains.reasons[i]
        assert (step["unscored"] is None) == bool(gains.scored[i])


@pytest.mark.parametrize("protocol", [REFINE, SEARCH_R1], ids=lambda p: p.name)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_scores_as_the_python_call(tmp_path, form, protocol):
    lines, progress = score(tmp_path, four(form, protocol), protocol=protocol.name, seed=3, num_random=2)
    expected = score_information_gain(
        policy(), TOKENIZER, rollouts(protocol), GOLDS, protocol=protocol, seed=3, num_random=2
    )
    assert expected.scored.all()
    assert_gains(lines, expected)
    assert [line["id"] for line in lines] == ["r0", "r1", "r2", "r3"]
    assert [line["line"] for line in lines] == [1, 2, 3, 4]
    unknown = {"unknown_logprobs"}
    assert {k: v for k, v in expected.counts.items() if k not in unknown} == progress.counts
    assert progress.tokens == expected.tokens_forwarded
    for line, rollout in zip(lines, rollouts(protocol), strict=True):
        response = rollout.tokens[rollout.prompt_length :]
        for step, search in zip(line["steps"], rollout.searches, strict=True):
            assert step["query"] == search.query
            places = step.get("query_tokens")
            assert (places is None) == (form == "text")
            if places is not None:
                assert TOKENIZER.decode([i for a, z in places for i in response[a:z]]) == search.query


def test_a_stream_larger_than_a_window_is_scored_window_by_window(tmp_path):
    records, written = many(14)
    lines, progress = score(tmp_path, records, window=4, max_variants=2)
    for start, size in ((0, 4), (4, 4), (8, 4), (12, 2)):
        part = score_information_gain(policy(), TOKENIZER, written[start : start + size], max_variants=2)
        assert_gains(lines[start : start + size], part)
    assert (progress.windows, progress.rollouts) == (4, 14)
    assert progress.counts["steps"] == progress.counts["scored"] == len(steps_of(lines)) == 21
    assert [line["group"] for line in lines] == [i // 2 for i in range(14)]


@pytest.mark.parametrize(
    ("rollouts", "window", "sizes"),
    [(8, 4, [4, 4]), (9, 4, [4, 5]), (10, 4, [4, 4, 2]), (3, 4, [3]), (1, 4, [1]), (3, 1, [1, 1, 1]), (6, 5, [6])],
)
def test_a_small_rest_joins_the_window_before_it(rollouts, window, sizes):
    assert windows.window_sizes(rollouts, window) == sizes


def stop_at(monkeypatch, window):
    """Interrupt the scoring of this window, from 0; returns the sizes of the windows that were scored."""
    scored = []

    def interrupted(batch, *arguments, **options):
        if len(scored) == window:
            raise KeyboardInterrupt
        scored.append(len(batch))
        return score_steps(batch, *arguments, **options)

    score_steps = windows.score_steps
    monkeypatch.setattr(windows, "score_steps", interrupted)
    return scored


@pytest.mark.parametrize("window", [0, 1, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch, window):
    records, _ = many(14)
    _, whole = score(tmp_path, records, "whole.jsonl", window=4)
    with monkeypatch.context() as patch:
        stop_at(patch, window)
        with pytest.raises(KeyboardInterrupt):
            score(tmp_path, records, window=4)
    assert not (tmp_path / "gains.jsonl").exists()
    partial = tmp_path / "gains.jsonl.partial"
    done = partial.read_bytes()
    assert (tmp_path / "whole.jsonl").read_bytes().startswith(done)
    assert done.count(b"\n") == 4 * window
    partial.write_bytes(done + b'{"id": "rollout 3", "li')  # of the window in which it was killed
    scored = stop_at(monkeypatch, None)
    _, progress = score(tmp_path, records, window=4)
    assert scored == [4, 4, 4, 2][window:]
    assert (tmp_path / "gains.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (progress.counts, progress.tokens, progress.sha256) == (whole.counts, whole.tokens, whole.sha256)
    assert sorted(p.name for p in tmp_path.glob("gains*")) == ["gains.jsonl", "gains.jsonl.run.json"]
    _, again = score(tmp_path, records, window=4)
    assert again == progress
    assert len(scored) == 4 - window  # nothing was scored again


def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path, model_directory):
    log = put(tmp_path / "rollouts.jsonl", many(90)[0])
    common = [str(log), "--model", str(model_directory), "--dtype", "float32", "--window", "3", "--device", "cpu"]
    out = tmp_path / "gains.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "stepcredit.score", *common, "--out", str(out)])
    record, deadline = tmp_path / "gains.jsonl.run.json", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if record.exists() and json.loads(record.read_text())["progress"]["windows"] >= 2:
            break
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -9, "the run ended before it was killed"
    assert 6 <= json.loads(record.read_text())["progress"]["rollouts"] < 90
    assert command.main([*common, "--out", str(out)]) == 0
    assert command.main([*common, "--out", str(tmp_path / "whole.jsonl")]) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(read(out)) == 90


def test_what_is_not_the_run_that_was_stopped_is_refused(tmp_path, monkeypatch):
    records, _ = many(8)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            score(tmp_path, records, window=4)
    other = random_policy("llama", TOKENIZER)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(2)
    changed = [records[0] | {"group": 7}, *records[1:]]
    for message, lines, options in (
        ("is of a run with another input", changed, {}),
        ("is of a run with another input", records[:-1], {}),
        (r"another window \(window=4, now 3\)", records, {"window": 3}),
        (r"another seed \(seed=0, now 1\): run that one, choose another --out", records, {"seed": 1}),
        (r"another max_context \(max_context=None, now 90\)", records, {"max_context": 90}),
        ("another protocol", records, {"protocol": "search_r1"}),
        ("another model", records, {"scorer": PolicyScorer(other, TOKENIZER, REFINE)}),
    ):
        with pytest.raises(ValueError, match=message):
            score(tmp_path, lines, **{"window": 4, **options})
    partial = tmp_path / "gains.jsonl.partial"
    lines = partial.read_bytes()
    for harm in (lines[:-2], lines.replace(b"query", b"quern", 1)):
        partial.write_bytes(harm)
        with pytest.raises(ValueError, match=r"does not hold the \d+ bytes that gains\.jsonl\.run\.json"):
            score(tmp_path, records, window=4)
    (tmp_path / "gains.jsonl.run.json").write_text("{")
    with pytest.raises(ValueError, match=r"gains\.jsonl\.run\.json is not readable"):
        score(tmp_path, records, window=4)
    (tmp_path / "gains.jsonl.run.json").unlink()
    for name in ("gains.jsonl.partial", "gains.jsonl"):
        (tmp_path / name).write_bytes(b"mine\n")
        with pytest.raises(FileExistsError, match=rf"{name} is there, but not its record"):
            score(tmp_path, records, window=4)
        assert (tmp_path / name).read_bytes() == b"mine\n"


def test_two_runs_cannot_write_one_output(tmp_path):
    with Journal(tmp_path / "gains.jsonl", {}), pytest.raises(BlockingIOError, match="another process writes it"):
        Journal(tmp_path / "gains.jsonl", {}).__enter__()


def test_a_log_that_changes_while_it_is_scored_is_noticed(tmp_path):
    records, _ = many(8)
    log = check_log(put(tmp_path / "rollouts.jsonl", records), quiet())
    longer, shorter, other = [*records, many(9)[0][8]], records[:-1], [records[0] | {"meta": {}}, *records[1:]]
    for name, changed in {"longer": longer, "shorter": shorter, "other": other}.items():
        put(log.path, changed)
        scorer, out = PolicyScorer(policy(), TOKENIZER, REFINE), tmp_path / f"{name}.jsonl"
        with pytest.raises(RuntimeError, match="the log was changed while it was scored"):
            windows.score_log(log, out, Options(window=4), scorer, quiet())
        assert not out.exists()


def test_a_rollout_without_a_search_has_a_line(tmp_path):
    question = Question("q", "Who?", ("me",))
    spans = {"spans": [{"kind": "answer", "start": 0, "stop": 2}]}
    names = [{"id": f"n{i}", "gold": "me"} for i in range(4)]
    lines, progress = score(
        tmp_path,
        [
            names[0] | {"prompt": "Who?", "response": ""},
            names[1] | {"prompt": "Who?", "response": "<search>x</search>", "meta": {"a": [1.5, None, "é\u2028\x85"]}},
            names[2] | in_tokens(write(TOKENIZER, question, []), "mask"),
            names[3] | {"prompt_ids": [5], "response_ids": [6, 7]} | spans,
        ],
    )
    assert [len(line["steps"]) for line in lines] == [0, 1, 0, 0]
    assert lines[1]["steps"][0]["unscored"] == "no_documents"
    assert lines[1]["counts"] == {"unanswered_searches": 1}
    assert lines[1]["meta"] == {"a": [1.5, None, "é\u2028\x85"]}
    assert [line["question_id"] == lines[0]["question_id"] for line in lines] == [True, True, False, False]
    assert progress.counts["unscored_no_documents"] == progress.counts["unanswered_searches"] == 1
    lines, progress = score(tmp_path, [names[0] | {"prompt": "Who?", "response": ""}], "none.jsonl")
    assert (lines[0]["steps"], progress.counts["steps"]) == ([], 0)


def test_what_cannot_be_scored_says_why(tmp_path):
    tokenizer = BUILT["wordpiece"]()
    scorer = PolicyScorer(random_policy("llama", tokenizer), tokenizer, REFINE)
    golds = [["\u200b"], ["\u200b", "Rhône"], ["Paris"], ["e"]]
    records = [{**line, "golds": gold} for line, gold in zip(four("text"), golds, strict=True)]
    for record in records:
        del record["gold"]
    lines, progress = score(tmp_path, records, scorer=scorer)
    assert [s["unscored"] for _, s in steps_of(lines)] == ["no_answer", "no_answer", None, None, None]
    assert '"gain": null' in (tmp_path / "gains.jsonl").read_text(encoding="utf-8")
    assert (progress.counts["unscored_no_answer"], progress.counts["empty_answers"]) == (2, 3)
    lines, progress = score(tmp_path, four("mask"), "weight.jsonl", head_tokens=99, head_weight=0.0)
    assert {s["unscored"] for _, s in steps_of(lines)} == {"no_weight"}
    lines, progress = score(tmp_path, four("mask"), "alone.jsonl", window=1)
    assert [s["unscored"] for _, s in steps_of(lines)] == [None, None, "empty_pool", "empty_pool", "empty_pool"]
    assert progress.counts["pool_fallback"] == 2
    lines, _ = score(tmp_path, four("spans"), "long.jsonl", max_context=5)
    assert {s["unscored"] for _, s in steps_of(lines)} == {"too_long"}


def test_lines_that_do_not_fit_the_model_are_named(tmp_path):
    mask = four("mask")
    mask[2]["response_ids"] = [5, 100_000]
    mask[2]["policy_mask"] = [1, 1]
    with pytest.raises(ValueError, match=r"rollouts\.jsonl:3: rollout 'r2': field 'response_ids' holds 100000, but"):
        score(tmp_path, mask)
    broken, (a, b, c, _) = policy(), rollouts()
    with torch.no_grad():
        broken.get_input_embeddings().weight[min({*c.tokens} - {*a.tokens, *b.tokens})] = float("inf")
    scorer = PolicyScorer(broken, TOKENIZER, REFINE)
    with pytest.raises(RuntimeError, match=r"jsonl:3: rollout 'r2' to line 4: .* not finite .*question 'b'"):
        score(tmp_path, four("text"), "two.jsonl", window=2, scorer=scorer)
    assert json.loads((tmp_path / "two.jsonl.run.json").read_text())["progress"]["rollouts"] == 2


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    policy().save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return directory


def test_the_command_scores(tmp_path, model_directory, capsys):
    log = put(tmp_path / "rollouts.jsonl", four("spans"))
    log.write_bytes(b"\xef\xbb\xbf\r\n \n" + log.read_bytes().replace(b"\n", b"\r\n").rstrip())
    out = tmp_path / "gains.jsonl"
    arguments = [str(log), "--model", str(model_directory), "--out", str(out), "--dtype", "float32", "--verify"]
    assert command.main([*arguments, "--num-random", "2", "--device", "cpu"]) == 0
    assert_gains(read(out), score_information_gain(policy(), TOKENIZER, rollouts(), num_random=2))
    assert [line["line"] for line in read(out)] == [3, 4, 5, 6]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "scoring rollouts: 4/4" in printed.err
    assert "4 rollouts in 1 windows, 2 blank lines\n5 searches, 5 scored\ntokens forwarded: trunk " in printed.err
    assert "largest difference to separate forward passes: " in printed.err


def test_every_option_reaches_the_scoring(tmp_path, model_directory, monkeypatch):
    given = {
        "num_random": 2, "trunk": "skeleton", "baseline": "previous", "pool": "batch", "head_tokens": 2,
        "head_weight": 2.5, "max_variants": 3, "seed": 5, "max_tokens": 99, "max_context": 88, "verify": True,
    }  # fmt: skip
    seen = {}

    def score_steps(batch, scorer, **options):
        seen.update(options, protocol=scorer.protocol.name, dtype=scorer.model.dtype, rollouts=len(batch))
        raise KeyboardInterrupt

    monkeypatch.setattr(windows, "score_steps", score_steps)
    log = put(tmp_path / "rollouts.jsonl", four("mask"))
    flags = [f for n, v in given.items() if n != "verify" for f in (f"--{n.replace('_', '-')}", str(v))]
    flags += ["--verify", "--window", "3", "--protocol", "search_r1", "--dtype", "bfloat16", "--device", "cpu"]
    arguments = [str(log), "--model", str(model_directory), "--out", str(tmp_path / "gains.jsonl")]
    assert command.main([*arguments, *flags]) == 130
    assert seen == given | {"protocol": "search_r1", "dtype": torch.bfloat16, "rollouts": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "rollouts is missing; --help"),
        (["x.jsonl", "--model", "smollm2"], "--out is missing"),
        (["x.jsonl", "--model", "smollm2", "--out", "y"], "x.jsonl: there is no such file"),
        (["x", "--model", "smollm2", "--out", "absent/y"], "--out absent/y: there is no directory absent"),
        ([os.devnull, "--model", "smollm2", "--out", "y"], "is no regular file; a log is read twice"),
        (["x", "--model", "m", "--out", "y", "--num-random", "0"], "num_random must be at least 1, got 0"),
        (["x", "--model", "m", "--out", "y", "--window", "a"], "window must be an integer, got 'a'"),
        (["x", "--model", "m", "--out", "y", "--pool", "batches"], "got 'batches'; did you mean 'batch'?"),
        (["x", "--model", "m", "--out", "y", "--protocol", "refien"], "did you mean 'refine'?"),
        (["x", "--model", "m", "--out", "y", "--device", "gpu9"], "device must be a torch device"),
        (["x", "--model", "m", "--out", "y", "--head-weight", "nan"], "head_weight must be at least 0, got nan"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert command.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed


def test_a_bad_line_is_named_before_the_model_is_loaded(tmp_path, capsys):
    log = put(tmp_path / "rollouts.jsonl", [*four("text"), {"id": "x", "promt": "?"}])
    assert command.main([str(log), "--model", "./absent", "--out", str(tmp_path / "y")]) == 2
    message = f"error: {log}:5: rollout 'x': unknown field 'promt'; did you mean 'prompt'?\n"
    assert capsys.readouterr().err.endswith(message)
    log = put(tmp_path / "rollouts.jsonl", four("text"))
    assert command.main([str(log), "--model", "./absent", "--out", str(tmp_path / "y")]) == 2
    assert "model './absent' is written as a path" in capsys.readouterr().err


def test_schemas_and_help_are_printed(capsys):
    for name in command.SCHEMAS:
        assert command.main(["--print-schema", name]) == 0
        jsonschema.Draft202012Validator.check_schema(json.loads(capsys.readouterr().out))
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    assert "--head-tokens" in capsys.readouterr().out
