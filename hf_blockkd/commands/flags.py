"""A command line that answers a slip with one line: `FlagParser`."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

FLAG = re.compile(r"--[A-Za-z]\w*")


class FlagParser(argparse.ArgumentParser):
    """An `ArgumentParser` that names the nearest flag where one is mistyped, and prints no usage before its errors.

    A mistyped flag is looked for before anything else is: else what it stands for would be said to be missing. Parsers
    of commands are of this class, too.

    Example:
        ```python
        >>> from hf_blockkd.commands.flags import FlagParser
        >>> parser = FlagParser("tool")
        >>> _ = parser.add_argument("--output", required=True)
        >>> parser.parse_args(["--output", "folder"])
        Namespace(output='folder')

        ```
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
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
