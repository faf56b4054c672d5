"""The examples import one another by name, as they do where one of them is run, and keep to the tests' one thread."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch) -> None:
    import comparison

    monkeypatch.setattr(comparison, "use_all_cores", lambda: None)
