"""`python -m stepcredit.score ROLLOUTS --model MODEL --out GAINS`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from stepcredit.assets import resolve_model
from stepcredit.score.options import Options
from stepcredit.score.records import check_log
from stepcredit.score.windows import score_log, summary
from stepcredit.scorer import PolicyScorer
from stepcredit.train.overrides import as_text, describe_type, field_docs, parse_value
from stepcredit.train.policy import resolve_device, resolve_dtype
from stepcredit.train.progress import Reporter

SCHEMAS = ("rollout", "gains")


def main(argv: Sequence[str] | None = None) -> int:
    """Score a log. Returns the exit code: 0; 2 when an argument or a line is wrong; 130 when it was interrupted."""
    arguments = _parser().parse_args(argv)
    if arguments.print_schema:
        print(schema_text(arguments.print_schema), end="")
        return 0
    reporter = Reporter(Console(stderr=True, highlight=False, soft_wrap=True))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        for name in ("rollouts", "model", "out"):
            if getattr(arguments, name) is None:
                raise ValueError(f"{name if name == 'rollouts' else f'--{name}'} is missing; --help shows the usage")
        options, out = _options(arguments), Path(arguments.out)
        if not out.parent.is_dir():
            raise FileNotFoundError(f"--out {out}: there is no directory {out.parent}")
        device = resolve_device(options.device, "device")
        log = check_log(Path(arguments.rollouts), reporter)
        policy = load_scorer(arguments.model, options.protocol, device, resolve_dtype(options.dtype, device))
        progress = score_log(log, out, options, policy, reporter)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on after the last complete window", file=sys.stderr)
        return 130
    for line in summary(log, progress):
        reporter.line(line)
    return 0


def load_scorer(name: str, protocol: str, device: torch.device, dtype: torch.dtype) -> PolicyScorer:
    """The scorer of a model: "smollm2", a directory, or a Hub name."""
    source = resolve_model(name)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return PolicyScorer(model.to(device).eval(), tokenizer, protocol)


def schema_text(name: str) -> str:
    """The JSON schema (draft 2020-12) of a line of the input, "rollout", or of the output, "gains"."""
    return (resources.files("stepcredit") / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stepcredit.score",
        description="Information gain of every search in a log of rollouts, one JSON object a line in and out. "
        "A run that was stopped goes on when it is started again.",
        allow_abbrev=False,
    )
    parser.add_argument("rollouts", nargs="?", metavar="ROLLOUTS", help="the log, a JSON Lines file")
    parser.add_argument("--model", help="the policy: smollm2, a Hugging Face directory, or a Hub name")
    parser.add_argument("--out", metavar="GAINS", help="the JSON Lines file to write")
    parser.add_argument("--print-schema", choices=SCHEMAS, help="print the JSON schema of a line and stop")
    docs, hints, defaults = field_docs(Options), get_type_hints(Options), Options()
    for field in fields(Options):
        flag, default = "--" + field.name.replace("_", "-"), getattr(defaults, field.name)
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_const", const="true", help=docs[field.name])
        else:
            about = f"{docs[field.name]} ({describe_type(hints[field.name])}; default {as_text(default)})"
            parser.add_argument(flag, metavar=field.name.rpartition("_")[2].upper(), help=about.replace("%", "%%"))
    return parser


def _options(arguments: argparse.Namespace) -> Options:
    hints = get_type_hints(Options)
    given = {name: text for name in hints if (text := getattr(arguments, name)) is not None}
    return Options(**{name: parse_value(name, text, hints[name]) for name, text in given.items()})


if __name__ == "__main__":
    sys.exit(main())
