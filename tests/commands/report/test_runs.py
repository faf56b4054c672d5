"""What is read of a run's folder, and what is refused."""

import json
from pathlib import Path

import pytest

from hf_blockkd.commands.report.runs import read_log_history


def test_the_log_is_read_from_the_run_or_its_newest_checkpoint(tmp_path):
    def write(folder: Path, loss: float) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": loss}]}))

    write(tmp_path / "checkpoint-9", 9.0)
    write(tmp_path / "checkpoint-10", 10.0)
    assert read_log_history(tmp_path)[0]["loss"] == 10.0
    assert read_log_history(tmp_path / "checkpoint-9")[0]["loss"] == 9.0
    write(tmp_path, 11.0)
    assert read_log_history(tmp_path)[0]["loss"] == 11.0


@pytest.mark.parametrize("text", ["{", '{"epoch": 1}'])
def test_a_file_that_is_no_state_is_refused(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match="is no state of a trainer"):
        read_log_history(tmp_path)
