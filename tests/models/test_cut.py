"""What a student was cut from is kept beside it."""

from __future__ import annotations

import json

import pytest

from hf_blockkd.models.cut import CUT_NAME, Cut


def test_a_cut_comes_back_as_it_was(tmp_path):
    cut = Cut([0, 3], 4, [1, 2], [{"tensor": "a.weight", "dim": 1, "size": 3, "kept": [1, 2], "scores": [0.1, 1, 2]}])
    cut.save(tmp_path)
    assert Cut.load(tmp_path) == cut


def test_a_folder_without_one_has_none(tmp_path):
    assert Cut.load(tmp_path) is None


@pytest.mark.parametrize("channels", ["abc", 3, [2, 1], [1, 1], ["a"], [0.5]])
def test_channels_that_are_no_rising_indices_are_refused(tmp_path, channels):
    (tmp_path / CUT_NAME).write_text(json.dumps({"layers": [0], "depth": 2, "channels": channels}))
    with pytest.raises(ValueError, match=r"cut.json holds no cut \(.*\); delete it"):
        Cut.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", json.dumps({"layers": [0]}), json.dumps({"layers": [0], "deep": 3})])
def test_a_file_that_holds_no_cut_is_refused(tmp_path, text):
    (tmp_path / CUT_NAME).write_text(text)
    with pytest.raises(ValueError, match=r"cut.json holds no cut \(.*\); delete it, or cut the student again"):
        Cut.load(tmp_path)
