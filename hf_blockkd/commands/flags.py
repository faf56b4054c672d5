"""A command line that answers a slip with one line: `FlagParser`, `refuse`."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

FLAG = re.compile(r"--[A-Za-z]\w*")


class FlagParser(argparse.ArgumentParser):
    """An `ArgumentParser` that names the nearest flag where one is mistyped, and prints no usage before its errors.

    A mistyped flag is looked for before anything else is: else what it stands for would be said to be missing. Parsers
    of commands are of this class, too.

    Args:
        add_options: Adds flags to it when it is first needed; of a command, whose module need not be imported before.
        *args: As of `ArgumentParser`.
        **kwargs: As there.

    Example:
        ```python
        >>> from hf_blockkd.commands.flags import FlagParser
        >>> parser = FlagParser("tool")
        >>> _ = parser.add_argument("--output", required=True)
        >>> parser.parse_args(["--output", "folder"])
        Namespace(output='folder')

        ```
    """

    def __init__(
        self, *args: Any, add_options: Callable[[argparse.ArgumentParser], None] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._add_options = add_options

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        if self._add_options is not None:
            self._add_options(self)
            self._add_options = None
        args = sys.argv[1:] if args is None else list(args)
        known = {flag for flag in self._option_string_actions if FLAG.fullmatch(flag)}
        # Flags of a command are looked at by its own parser.
        given = (FLAG.match(one) for one in args if len(known) > 1)
        for flag in (match[0] for match in given if match):
            if not any(name.startswith(flag) for name in (*known, "--help")):
                near = difflib.get_close_matches(flag, sorted(known), n=1)
                advice = f"did you mean {near[0]}?" if near else "see --help."
                self.error(f"there is no flag {flag}; {advice}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """One line on stderr, and code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def refuse(error: Exception) -> int:
    """Say on stderr, in one line, why a command does not go on; returns the exit code."""
    print(f"hf-blockkd: {' '.join(str(error).split())}", file=sys.stderr)
    return 1
