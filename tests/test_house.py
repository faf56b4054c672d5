"""The page about the house shows the rooms that the contract of `make lint` holds, in its order."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_shows_the_rooms_in_their_order():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    *rooms, beside = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    page = (ROOT / "hf_blockkd" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^(\w+)(?:/|\.py) +\S", page, re.MULTILINE) == rooms
    assert all(f"`{name}.py`" in page for name in beside.split(" | "))


def test_the_tests_have_the_same_rooms():
    rooms = {path.parent.name for path in ROOT.glob("hf_blockkd/*/__init__.py")}
    assert rooms <= {path.parent.name for path in ROOT.glob("tests/*/__init__.py")}
