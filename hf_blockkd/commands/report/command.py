"""`hf-blockkd report`: a page about runs, and their pictures."""

from __future__ import annotations

import argparse
import sys

from .writing import report


def run(args: argparse.Namespace) -> int:
    """Write page and pictures, and print where they are, and what could not be drawn.

    Raises:
        ValueError: If there is no run.
        ImportError: If matplotlib is not installed.
    """
    page, pictures, missing = report(args.folders, args.output, args.metric)
    for lines, file in (([*pictures, page] if page else [], sys.stdout), (missing, sys.stderr)):
        if lines:
            print(*lines, sep="\n", file=file)
    return 0 if page else 1
