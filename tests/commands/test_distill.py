"""`hf-blockkd distill`: a student from a teacher and a data set alone, and what it answers to slips."""

import json
from pathlib import Path

import pytest
import transformers
from datasets import ClassLabel, Dataset, Image
from transformers import TrainerState, TrainingArguments

from hf_blockkd.commands import distill
from hf_blockkd.commands.cli import main
from hf_blockkd.commands.tables import read_splits, read_table, text_columns
from hf_blockkd.models.cut import Cut
from hf_blockkd.models.loading import load_model

from ..helpers.tiny_models import LABELS, tiny_bert, tiny_gpt2, tiny_vit
from ..helpers.training import assert_same_state, state_of
from .test_cut import WORDS, pictures, refused, saved, with_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def bert(tmp_path):
    return with_tokenizer(tiny_bert(), tmp_path / "bert")


@pytest.fixture
def texts(tmp_path):
    return texts_of(tmp_path / "texts.tsv")


def test_images_become_a_student_with_figures_card_and_processor(tmp_path, capsys):
    saved(tiny_vit(), tmp_path / "vit")
    transformers.ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]
    ).save_pretrained(tmp_path / "vit")
    rows = {"image": [{"bytes": None, "path": path} for path in pictures(tmp_path / "images")], "label": [0, 1, 2] * 8}
    table = Dataset.from_dict(rows).cast_column("image", Image()).cast_column("label", ClassLabel(names=list("abc")))
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        table.to_parquet(tmp_path / "data" / f"{split}.parquet")
    output = tmp_path / "student"
    assert distilled(str(tmp_path / "vit"), str(tmp_path / "data"), output) == 0
    printed = capsys.readouterr().out
    assert "24 rows to train on, 24 (split `test`) to measure on" in printed
    assert "student, trained" in printed
    student, info = transformers.AutoModelForImageClassification.from_pretrained(output, output_loading_info=True)
    assert not any(info.values())
    assert student.num_parameters() <= 0.25 * tiny_vit().num_parameters()
    assert transformers.AutoImageProcessor.from_pretrained(output, backend="pil").size["height"] == 8
    assert Cut.load(output) is not None
    figures = json.loads((output / "all_results.json").read_text())
    assert {"eval_accuracy", "eval_before_accuracy", "eval_teacher_accuracy", "eval_kl", "train_loss"} <= set(figures)
    assert "hf-blockkd" in (output / "README.md").read_text()


def test_texts_without_labels_teach_by_the_teacher_alone(tmp_path, bert, texts, capsys):
    rows = [line.split("\t")[0] for line in Path(texts).read_text().splitlines()]
    (tmp_path / "texts.txt").write_text("\n".join(rows))
    output = tmp_path / "student"
    assert distilled(bert, str(tmp_path / "texts.txt"), output, "--num_layers", "2") == 0
    printed = capsys.readouterr().out
    assert "no column holds the classes of the teacher (LABEL_0, LABEL_1" in printed
    assert "32 rows to train on, 8 (10% held out)" in printed
    figures = json.loads((output / "all_results.json").read_text())
    assert "eval_kl" in figures
    assert "eval_accuracy" not in figures
    assert load_model(str(output)).config.num_hidden_layers == 2


def test_a_language_model_learns_from_a_running_text_whose_end_is_held_out(tmp_path, capsys):
    gpt2 = with_tokenizer(tiny_gpt2(), tmp_path / "gpt2")
    lines = [" ".join(WORDS[4 + (i * j) % 50] for j in range(1, 12)) for i in range(300)]
    (tmp_path / "novel.txt").write_text("\n".join(lines))
    options = ["--max_length", "8", "--num_layers", "1"]
    assert distilled(gpt2, str(tmp_path / "novel.txt"), tmp_path / "student", *options) == 0
    printed = capsys.readouterr().out
    # 270 lines of 11 words, and 30.
    assert f"{270 * 11 // 8} rows to train on, {30 * 11 // 8} (" in printed
    assert json.loads((tmp_path / "student" / "all_results.json").read_text())["eval_perplexity"] > 1


def test_a_command_that_was_killed_goes_on_and_ends_with_the_same_bits(tmp_path, bert, texts, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative checkpoint looks like a name on the hub
    whole, cut = Path("whole"), Path("cut")
    assert distilled(bert, texts, whole) == 0

    class Killed(distill._Lines):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distill, "_Lines", Killed)
        with pytest.raises(KeyboardInterrupt):
            distilled(bert, texts, cut)
    assert not (cut / "model.safetensors").exists()
    capsys.readouterr()
    assert distilled(bert, texts, cut) == 0
    assert "goes on from" in capsys.readouterr().out
    assert_same_state(state_of(load_model(str(cut))), state_of(load_model(str(whole))))
    results = [json.loads((one / "eval_results.json").read_text()) for one in (whole, cut)]
    assert results[0] == results[1]
    assert "base_model" not in (cut / "README.md").read_text().split("# ")[0]


def test_a_line_tells_the_parts_of_the_loss_instead_of_a_sum_whose_weights_fall(capsys):
    lines, state = distill._Lines(), TrainerState(global_step=3, max_steps=9, save_steps=1)
    logs = {"loss": 5.5, "loss_task": 1.0, "loss_distill": 2.0, "loss_cross": 0.0, "loss_state": 0.5}
    lines.on_log(TrainingArguments(eval_strategy="steps", use_cpu=True), state, None, logs)
    lines.on_evaluate(None, state, None, {"eval_accuracy": 0.5})
    assert capsys.readouterr().out == (
        "step      3 of 9  task 1.000  distillation 2.000  states 0.500  accuracy 50.0%\n"
    )


@pytest.mark.parametrize(
    ("before", "after", "is_worse"),
    [
        ({"kl": 0.1}, {"kl": 0.2}, True),
        ({"mse": 0.2}, {"mse": 0.1}, False),
        ({"kl": 0.1, "student_accuracy": 0.7}, {"kl": 0.2, "student_accuracy": 0.8}, False),
        ({"kl": 0.2, "student_perplexity": 70.0}, {"kl": 0.1, "student_perplexity": 80.0}, True),
    ],
    ids=["further", "nearer", "more accurate", "more perplexed"],
)
def test_a_training_that_made_it_worse_is_known_by_the_labels_or_else_by_the_teacher(before, after, is_worse):
    assert distill.got_worse(before, after) == is_worse


def test_a_command_killed_before_its_first_checkpoint_begins_anew(tmp_path, bert, texts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(distill.BlockwiseDistillTrainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distilled(bert, texts, tmp_path / "student")
    assert distilled(bert, texts, tmp_path / "student") == 0


def test_a_run_with_other_options_is_not_gone_on_with(tmp_path, bert, texts, capsys):
    assert distilled(bert, texts, tmp_path / "student") == 0
    message = refused(capsys, command(bert, texts, tmp_path / "student", "--learning_rate", "1e-3"))
    assert "`learning_rate` is 0.001, but None in the run" in message


def test_a_command_that_was_refused_is_given_again_with_other_options(tmp_path, bert, texts, capsys):
    assert distilled(bert, texts, tmp_path / "student", "--parameters", "3") != 0
    assert "`parameters` is 3.0" in capsys.readouterr().err
    assert distilled(bert, texts, tmp_path / "student", "--num_layers", "2") == 0


def test_a_learning_rate_that_is_said_is_taken(tmp_path, bert, texts, capsys):
    assert distilled(bert, texts, tmp_path / "student", "--learning_rate", "1e-3") == 0
    assert "0.001: as you said" in capsys.readouterr().out
    assert json.loads((tmp_path / "student" / "training_args.json").read_text())["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rate", "0"], "`learning_rate` is 0.0"),
        (["--epochs", "-1"], "`epochs` is -1.0"),
        (["--column", "words"], "`column` is words, but the data set has text, label"),
        (["--dataset", "none.csv"], "there is no such file or folder"),
        (["--dataset", "EMPTY"], "which cannot be read"),
        (["--dataset", "HEADER"], "header.csv', which cannot be read"),
        (["--dataset", "nowhere"], "'nowhere', which is no file or folder here, and cannot be read"),
        (["--dataset", "FEW"], "too few to hold some out"),
        (["--teacher", "./none"], "There is no folder"),
        (["--teacher", "nowhere"], "'nowhere' is no folder here, and no model of that name was found"),
        (["--parameters", "0.5", "--flops", "0.5"], "give one of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_slips_are_answered_in_a_sentence(tmp_path, bert, texts, options, message, capsys):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "few.csv").write_text("text,label\nw1 w2,0\n")
    (tmp_path / "header.csv").write_text("text,label\n")
    files = {name.upper(): str(tmp_path / f"{name}.csv") for name in ("empty", "few", "header")}
    options = [files.get(option, option) for option in options]
    assert message in refused(capsys, command(bert, texts, tmp_path / "student", *options))


def test_a_folder_with_something_else_is_left_alone(tmp_path, bert, texts, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    assert "holds something else" in refused(capsys, command(bert, texts, tmp_path / "full"))
    assert "the teacher's own folder" in refused(capsys, command(bert, texts, bert))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note"]


# ---- Data sets ----


def test_a_folder_of_tables_without_headers_has_its_splits(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "dev"):
        texts_of(tmp_path / "data" / f"{split}.tsv")
    splits = read_splits(str(tmp_path / "data"))
    assert {name: len(table) for name, table in splits.items()} == {"train": 40, "validation": 40}
    assert splits["train"].column_names == ["text", "label"]
    assert read_table(str(tmp_path / "data"), "train[:5]")[:] == splits["train"][:5]


def test_a_column_that_says_the_classes_in_words_is_no_text():
    rows = {"review": [f"words {i}" for i in range(40)], "mood": ["good", "bad"] * 20, "label": [1, 0] * 20}
    table = Dataset.from_dict(rows)
    assert text_columns(table, None, most=2) == ["review"]
    assert text_columns(table, ["review", "mood"], most=2) == ["review", "mood"]


# ---- Helpers ----


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def texts_of(path) -> str:
    lines = (f"{' '.join(WORDS[4 + (i * j) % 50] for j in range(1, 4 + i % 5))}\t{i % LABELS}\n" for i in range(40))
    path.write_text("".join(lines))
    return str(path)


def command(teacher: str, data: str, output, *options: str) -> list[str]:
    return ["distill", "--teacher", teacher, "--dataset", data, "--output", str(output), "--epochs", "2", *options]


def distilled(*args) -> int:
    return main(command(*args))
