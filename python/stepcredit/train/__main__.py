"""`python -m stepcredit.train RECIPE field=value ...`"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from transformers.utils import logging as transformers_logging

from stepcredit.credit import METHODS
from stepcredit.train.config import TrainConfig
from stepcredit.train.loop import train
from stepcredit.train.memory import train_memory
from stepcredit.train.memory_setup import build_memory
from stepcredit.train.overrides import apply_overrides, as_text, describe_type, field_docs, flatten, from_json
from stepcredit.train.progress import Reporter
from stepcredit.train.recipes import RECIPES, get_recipe
from stepcredit.train.setup import build


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe. Returns the exit code: 0, or 2 when an argument or a file it names is wrong."""
    arguments = _parser().parse_intermixed_args(argv)  # options and fields in any order
    if arguments.list:
        print("\n".join(_known()))
        return 0
    if arguments.help:
        recipe = next((word for word in arguments.words if word in RECIPES), None)
        print(help_text(recipe))
        return 0
    reporter = Reporter()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        config, directory = _configure(arguments)
        pipeline = bool(config.memory.conversations)
        parts: Any = build_memory(config, reporter) if pipeline else build(config, reporter)
        directory.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    reporter.line(f"{config.recipe}: writing to {directory}")
    if parts.dataset.attribution:
        reporter.line(parts.dataset.attribution)
    run: Callable[..., Any] = train_memory if pipeline else train
    run(config, parts, directory, resume=arguments.resume is not None)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stepcredit.train", add_help=False)
    parser.add_argument("words", nargs="*", metavar="RECIPE field=value")
    parser.add_argument("--resume", metavar="DIR")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    return parser


def _configure(arguments: argparse.Namespace) -> tuple[TrainConfig, Path]:
    """The configuration the arguments ask for, and where the run writes."""
    words = list(arguments.words)
    if arguments.resume is not None:
        directory = Path(arguments.resume)
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"--resume {directory}: there is no config.json of a run")
        if not (directory / "checkpoint" / "state.json").is_file():
            raise FileNotFoundError(f"--resume {directory}: no checkpoint; runs write one with checkpoint_every=N")
        config = apply_overrides(from_json(json.loads((directory / "config.json").read_text())), words)
        return config, directory
    name = words.pop(0) if words and "=" not in words[0] else "quickstart"
    config = apply_overrides(get_recipe(name), words)
    directory = Path(config.output_dir or f"runs/{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (directory / "metrics.jsonl").exists():
        raise FileExistsError(f"output_dir={directory} holds a run already: choose another, or --resume it")
    return config, directory


def help_text(recipe: str | None = None) -> str:
    """The help: what to type, the recipes, and every field with its meaning and its default, or a recipe's value."""
    config = get_recipe(recipe) if recipe else TrainConfig()
    lines = [
        "Train a search agent with step-level credit.",
        "",
        "  python -m stepcredit.train                         the quickstart",
        "  python -m stepcredit.train RECIPE field=value ...  a recipe with some fields changed",
        "  python -m stepcredit.train --resume DIR            go on from the checkpoint of a run",
        "  python -m stepcredit.train RECIPE --help           this, with the recipe's values",
        "  python -m stepcredit.train --list                  the recipes and the credit methods, a line each",
        "",
        "For example: python -m stepcredit.train quickstart seed=1 steps=5 credit=search_r1",
        "",
        *_known(),
        "",
        f"Fields with the values of {recipe}:" if recipe else "Fields with their defaults (a recipe changes some):",
        *_describe(config, ""),
    ]
    for method in {type(make()): make() for make in METHODS.values()}.values():
        method = config.credit if type(method) is type(config.credit) else method
        lines += ["", f"credit of type {type(method).__name__}", *_describe(method, "credit.")]
    return "\n".join(lines)


def _known() -> list[str]:
    """The recipes and the credit methods, a line each."""
    return [
        "Recipes:",
        *(f"  {name:<12} {_summary(make)}" for name, make in RECIPES.items()),
        "",
        "Credit methods, by credit=NAME:",
        *(f"  {name:<16} {_summary(make)}" for name, make in METHODS.items()),
    ]


def _describe(group: Any, prefix: str) -> list[str]:
    docs, hints, lines = field_docs(type(group)), get_type_hints(type(group)), []
    for f in sorted(fields(group), key=lambda f: is_dataclass(getattr(group, f.name))):
        value, name = getattr(group, f.name), prefix + f.name
        if not is_dataclass(value):
            lines += [f"  {name}={as_text(value)} ({describe_type(hints[f.name])})", f"      {docs[f.name]}"]
        elif f.name == "credit":
            lines += ["", f"  {name}={flatten(group)[name]} ({' | '.join(METHODS)})", f"      {docs[f.name]}"]
        else:
            lines += ["", f"{name}: {_summary(type(value))}", *_describe(value, f"{name}.")]
    return lines


def _summary(documented: Any) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join(inspect.cleandoc(documented.__doc__ or "").partition("\n\n")[0].split())


if __name__ == "__main__":
    sys.exit(main())
