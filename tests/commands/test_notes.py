"""What a killed `hf-blockkd distill` knows when it is given again; the whole command is in `test_distill`."""

import argparse
import json

import pytest

from hf_blockkd.commands.notes import NOTES_NAME, Notes


def asked(folder, **options) -> argparse.Namespace:
    return argparse.Namespace(teacher="a-name", output=folder, **options)


def test_an_empty_folder_belongs_to_the_run_that_begins_in_it(tmp_path):
    notes = Notes.of(asked(tmp_path / "student", seed=1))
    assert notes.student() is None
    notes.begin()
    assert json.loads((tmp_path / "student" / NOTES_NAME).read_text()) == {
        "asked": {"teacher": "a-name", "seed": 1},
        "found": {},
    }


def test_where_nothing_can_be_lost_other_options_begin_anew(tmp_path):
    Notes.of(asked(tmp_path, seed=1)).begin()
    assert Notes.of(asked(tmp_path, seed=2)).asked["seed"] == 2


def test_a_student_that_is_there_keeps_its_options(tmp_path):
    Notes.of(asked(tmp_path, seed=1)).begin()
    (tmp_path / "model.safetensors").touch()
    assert Notes.of(asked(tmp_path, seed=1)).checkpoint is None
    with pytest.raises(ValueError, match="`seed` is 2, but 1 in the run that"):
        Notes.of(asked(tmp_path, seed=2))


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_notes_that_are_none_are_refused(tmp_path, text):
    (tmp_path / NOTES_NAME).write_text(text)
    with pytest.raises(ValueError, match=f"{NOTES_NAME} cannot be read; name another `output`, or delete"):
        Notes.of(asked(tmp_path))
