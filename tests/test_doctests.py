from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import hf_blockkd

MODULES = [importlib.import_module(module.name) for module in pkgutil.walk_packages(hf_blockkd.__path__, "hf_blockkd.")]
EXAMPLES = [
    test
    for module in (hf_blockkd, *MODULES)
    for test in doctest.DocTestFinder().find(module, module.__name__)
    if test.examples
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_the_example_shows_what_it_says(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    results = doctest.DocTestRunner().run(example, out=report.append, clear_globs=False)
    assert results.attempted > 0
    assert results.failed == 0, "".join(report)


@pytest.mark.parametrize("name", hf_blockkd.__all__)
def test_what_a_person_builds_or_calls_has_an_example(name):
    public = getattr(hf_blockkd, name)
    if name in ("LayerStack", "RoutingReport", "UnsupportedArchitectureError"):
        assert inspect.getdoc(public), "made by the package itself, so described"
    else:
        assert f"{public.__module__}.{name}" in {test.name for test in EXAMPLES}
