"""Scores a log window by window."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import blake2b, sha256
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from stepcredit.batch import RolloutBatch
from stepcredit.counterfactual import score_steps
from stepcredit.score.journal import Journal, Progress
from stepcredit.score.options import Options
from stepcredit.score.records import Log, Record, is_blank, numbered_lines, read_line
from stepcredit.score.rollouts import output_lines, to_rollout
from stepcredit.scorer import PolicyScorer
from stepcredit.train.progress import Reporter


def score_log(log: Log, out: Path, options: Options, policy: PolicyScorer, reporter: Reporter) -> Progress:
    """Score the rollouts of a checked log into `out`, or go on where a run of the same was stopped.

    Returns:
        What the whole run did, earlier processes included; at once when `out` is complete.

    Raises:
        ValueError: `out` is of another run, or a line cannot be scored with this model; names it.
        OSError: `out` cannot be written.
        RuntimeError: a window could not be scored, and why; names its lines. Or the log changed while it was read.
    """
    with Journal(out, _identity(log, options, policy)) as journal:
        if journal.done:
            reporter.line(f"{out} is complete: nothing to score")
            return journal.progress
        if journal.progress.rollouts:
            reporter.line(f"{out}: {journal.progress.rollouts} rollouts were scored before, going on with the next")
        sizes = window_sizes(log.rollouts, options.window)[journal.progress.windows :]
        records = _records(log, journal.progress.rollouts)
        with reporter.task("scoring rollouts", log.rollouts) as advance:
            advance(journal.progress.rollouts)
            for size in sizes:
                window = list(islice(records, size))
                lines, progress = _score(window, options, policy, journal.progress)
                journal.append(lines, progress)
                advance(size)
        for record in records:
            raise RuntimeError(f"{record.where}: the log was changed while it was scored")
        journal.finish()
        return journal.progress


def window_sizes(rollouts: int, window: int) -> list[int]:
    """How many rollouts each window takes. A rest of less than half a window would have few passages to draw from: it
    joins the window before it."""
    whole, rest = divmod(rollouts, window)
    sizes = [window] * whole
    if whole and 2 * rest < window:
        sizes[-1] += rest
    elif rest:
        sizes.append(rest)
    return sizes


def summary(log: Log, progress: Progress) -> list[str]:
    """What a run did, in lines for people."""
    counts = dict(progress.counts)
    steps, scored = counts.pop("steps", 0), counts.pop("scored", 0)
    unscored = {name.removeprefix("unscored_"): n for name, n in counts.items() if name.startswith("unscored_")}
    other = {name: n for name, n in counts.items() if not name.startswith("unscored_")}
    lines = [
        f"{progress.rollouts} rollouts in {progress.windows} windows, {log.blank_lines} blank lines",
        f"{steps} searches, {scored} scored{_listed('; not scored: ', unscored)}",
        f"tokens forwarded{_listed(': ', progress.tokens)}; {progress.seconds:.1f} s of scoring",
    ]
    if any(other.values()):
        lines.append(_listed("counts: ", other))
    if progress.difference is not None:
        lines.append(f"largest difference to separate forward passes: {progress.difference:.1e} nats per answer token")
    return lines


def _listed(head: str, counts: dict[str, int]) -> str:
    return (head + ", ".join(f"{name} {n}" for name, n in counts.items() if n)) if any(counts.values()) else ""


def _score(
    window: list[Record], options: Options, policy: PolicyScorer, before: Progress
) -> tuple[list[str], Progress]:
    """The lines of a window, and the progress of the run with it."""
    rollouts = [to_rollout(record, policy) for record in window]
    try:
        gains = score_steps(RolloutBatch.pack(rollouts), policy, **options.of_scoring())
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise RuntimeError(f"{window[0].where} to line {window[-1].line}: {error}") from error
    counts, tokens = Counter(before.counts), Counter(before.tokens)
    for more in (gains.counts, *(rollout.counts for rollout in rollouts)):
        counts.update(more)
    counts.pop("unknown_logprobs", None)  # scoring needs none
    tokens.update(gains.tokens_forwarded)
    differences = [d for d in (before.difference, gains.difference) if d is not None]
    progress = Progress(
        windows=before.windows + 1,
        rollouts=before.rollouts + len(window),
        counts=dict(counts),
        tokens=dict(tokens),
        seconds=before.seconds + gains.seconds,
        difference=max(differences, default=None),
    )
    return output_lines(window, rollouts, gains, policy), progress


def _records(log: Log, skip: int) -> Iterator[Record]:
    """The rollouts of a log after the first `skip`. RuntimeError when its bytes are no longer those that were
    checked."""
    digest, seen = sha256(), 0
    for number, line in numbered_lines(log.path):
        digest.update(line)
        if not is_blank(line, number) and (seen := seen + 1) > skip:
            yield read_line(line, log.path, number)
    if digest.hexdigest() != log.sha256:
        raise RuntimeError(f"{log.path}: the log was changed while it was scored")


def _identity(log: Log, options: Options, policy: PolicyScorer) -> dict[str, Any]:
    """All that the output depends on."""
    return {
        "input_sha256": log.sha256,
        "weights": _fingerprint(policy),
        **asdict(options),
        "device": policy.model.device.type,
        "dtype": str(policy.model.dtype),
        **{name: _version(name) for name in ("stepcredit", "torch", "transformers")},
    }


def _fingerprint(policy: PolicyScorer) -> str:
    """A hash of the configuration, of up to 64 values of every tensor of the weights, and of the vocabulary."""
    config = {k: v for k, v in policy.model.config.to_dict().items() if k != "_name_or_path"}  # may be moved
    digest = blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(policy.model.state_dict().items()):
        sample = tensor.flatten()[:: max(1, tensor.numel() // 64)][:64]
        digest.update(repr((name, tuple(tensor.shape), sample.tolist())).encode())
    digest.update(repr(sorted(policy.tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
