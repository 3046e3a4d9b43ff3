"""The command line: `sra doctor`, `sra align`, `sra distill` and the other commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sra.commands import align, bench, cache, demo, distill, doctor, evaluate, report


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="sra", description="Distil a language model across tokenizers, span by span."
    )
    commands = whole.add_subparsers(dest="command", required=True)
    for command in (doctor, align, cache, distill, report, evaluate, demo, bench):
        command.add(commands)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors that a user can mend are one sentence, without a traceback."""
    for stream in (sys.stdout, sys.stderr):  # lines and arrows are lost where there is no UTF-8
        if stream.encoding.lower() != "utf-8" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    whole = parser()
    args, rest = whole.parse_known_args(argv)
    if getattr(args, "takes_rest", False):  # it reads its own arguments
        args.options = rest
    elif rest:
        whole.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"sra {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
