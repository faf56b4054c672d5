"""The console command `hf-blockkd`: `check` a model, `cut` and `distill` a student, `plan` a run, `report` it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from . import options
from .flags import FlagParser, refuse

COMMANDS = {
    "check": "test whether hidden states can be routed through a model's layers",
    "cut": "cut a smaller student out of a teacher, and measure it before training",
    "distill": "cut a student, train it, measure it and report, all in one",
    "plan": "blocks, connectors, parameters, FLOPs and memory, before anything trains",
    "report": "write one page about runs, and their pictures",
}
"""Modules beside this one, each with `run(args)`, and what they do; `options` has a function of each name, too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hf-blockkd`.

    Args:
        argv: The arguments; default: those of the process.

    Returns:
        The exit code: 0, or 1 with one sentence on stderr where a model, a setting or a run is refused.

    Raises:
        SystemExit: From argparse, with code 2, for arguments that it does not understand.

    Example:
        ```python
        >>> from hf_blockkd.commands.cli import main
        >>> main(["report", "no/such/run"])
        1

        ```
    """
    parser = FlagParser("hf-blockkd", description="Block-wise logit distillation for transformers models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_options=getattr(options, name))
    args = parser.parse_args(argv)
    # torch and transformers take seconds to import, which no help and no slip need wait for.
    command = import_module(f".{vars(args).pop('command')}", __package__)
    _quiet()
    try:
        return command.run(args)
    except (ValueError, OSError, ImportError) as error:
        return refuse(error)


def _quiet() -> None:
    """Nothing but what a command has to say: no bars over files that it loads, and no advice of libraries."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


if __name__ == "__main__":
    sys.exit(main())
