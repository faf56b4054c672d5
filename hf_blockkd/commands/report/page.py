"""One page that needs nothing beside it: `render`, and what a page is made of."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader

from .drawing import Panel, panel_png


@dataclass(frozen=True)
class Table:
    """Rows under heads.

    Attributes:
        heads: Names of the columns.
        rows: Cells as text.
        numbers: Places of the columns that stand at the right.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numbers: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """A panel as the page holds it."""

    title: str
    source: str
    alt: str
    note: str
    terms: Sequence[str]

    @classmethod
    def of(cls, panel: Panel) -> Picture:
        source = "data:image/png;base64," + base64.b64encode(panel_png(panel)).decode()
        alt = f"{panel.title}: {panel.note or ', '.join(panel.terms)}"
        return cls(panel.title, source, alt, panel.note, panel.terms)


@dataclass(frozen=True)
class Part:
    """Sentences, then pictures, then tables under a heading.

    Attributes:
        title: The heading.
        lines: Sentences.
        tables: Last.
        pictures: Panels, as many side by side as there is room for.
        is_soft: Whether the sentences only say what is missing.
        is_folded: Whether a reader opens it first.
    """

    title: str
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    is_soft: bool = False
    is_folded: bool = False


@dataclass(frozen=True)
class Section:
    """Parts under a heading, folded where a reader opens them one by one."""

    title: str
    parts: list[Part] = field(default_factory=list)
    is_folded: bool = False


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page as HTML, with its style and its pictures in it, and without scripts.

    Args:
        title: Its heading.
        subtitle: A sentence under it.
        sections: From above.

    Example:
        ```python
        >>> from hf_blockkd.commands.report.page import Part, Section, render
        >>> html = render("A run", "of one step", [Section("Time", [Part("Training", ["1 < 2 s"])])])
        >>> "1 &lt; 2 s" in html, "<script" in html
        (True, False)

        ```
    """
    environment = Environment(
        loader=PackageLoader(__package__, "."), autoescape=True, trim_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template("page.html").render(title=title, subtitle=subtitle, sections=sections)
