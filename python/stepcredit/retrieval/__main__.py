"""`python -m stepcredit.retrieval build|inspect|serve ...`"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

#: The module of each command, imported when the command is asked for.
COMMANDS = {
    "build": "stepcredit.retrieval._build",
    "inspect": "stepcredit.retrieval._build",
    "serve": "stepcredit.retrieval._serve",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 2 when an argument or a file it names is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words and words[0] in COMMANDS else None
    parser = argparse.ArgumentParser(prog="python -m stepcredit.retrieval", description="Indexes of passages.")
    if command is None:
        parser.add_argument("command", choices=COMMANDS)
        parser.parse_args(words)  # helps or refuses
        return 2
    parser.prog += f" {command}"
    module = importlib.import_module(COMMANDS[command])
    module.add_arguments(command, parser)
    try:
        return int(module.run(command, parser.parse_args(words[1:])))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
