"""The example of embedding models runs on a text file, and says how near its students came."""

import json
import sys

import distill_embeddings
import pytest
from transformers import BertTokenizerFast

from hf_blockkd.models.loading import load_model
from hf_blockkd.models.pooling import Pooling

from ..helpers.tiny_models import VOCABULARY, tiny_bert

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop.?"]


@pytest.fixture
def teacher(tmp_path):
    folder = tmp_path / "teacher"
    tiny_bert(None).save_pretrained(folder)
    unused = [f"[unused{i}]" for i in range(VOCABULARY - len(WORDS))]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS + unused)}).save_pretrained(folder)
    Pooling(("mean",), normalize=True).save(folder, 16)
    return folder


def test_sentences_are_those_of_paragraphs_whatever_their_lines():
    lines = ["A b c.  D e f", "g? \u201cH i j k.\u201d", "", "A b c. No", "", "l m n"]
    assert distill_embeddings.sentences(lines, 3)["text"] == ["A b c.", "D e f g?", "\u201cH i j k.\u201d", "l m n"]
    with pytest.raises(ValueError, match="`least_words` 9"):
        distill_embeddings.sentences(lines, 9)


def test_students_are_compared_with_their_teacher_on_held_out_sentences(tmp_path, teacher, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    letters = WORDS[5:-2]
    text.write_text(
        "\n".join(
            " ".join(letters[(i * j) % len(letters)] for j in range(1, 7)) + f" {letters[i % 15]}." for i in range(60)
        )
    )
    flags = [f"--teacher={teacher}", f"--train_file={text}", f"--output_dir={tmp_path / 'out'}", "--student_layers=2"]
    flags += [
        "--num_blocks=2",
        "--max_steps=2",
        "--use_cpu=true",
        "--disable_tqdm=true",
        "--save_strategy=no",
        "--eval_fraction=0.3",
    ]
    monkeypatch.setattr(sys, "argv", ["distill_embeddings.py", *flags])
    distill_embeddings.main()
    runs = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [run["model"] for run in runs] == ["teacher", "student, plain KD", "student, Block-KD"]
    assert runs[0]["rank correlation"] == 1.0
    assert all(0.2 < run["rank correlation"] <= 1.0 for run in runs[1:])
    assert runs[1]["curve"][0] == runs[2]["curve"][0]  # both begin at the cut
    assert "rank correlation" in capsys.readouterr().out
    assert load_model(str(tmp_path / "out" / "block_kd")).pooling == Pooling(("mean",), normalize=True)
