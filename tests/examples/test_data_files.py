"""Files of one's own become rows to train and to evaluate on; what is wrong with a path or a file is said as that."""

import json

import distill_lm
import pytest
from arguments import ModelArguments
from data_files import load_splits
from image_data import ImageDataArguments, load_images
from lm_data import LMDataArguments, load_lines
from text_data import TextDataArguments, load_texts, load_unlabelled

REVIEWS = ["very good", "very bad", "NA", "so so"] * 5
LABELS = ["good", "bad", "None", "007"] * 5


def write_csv(path, texts=REVIEWS, labels=LABELS, header=("text", "label")) -> str:
    path.write_text(
        "\n".join([",".join(header), *(f"{text},{label}" for text, label in zip(texts, labels, strict=True))])
    )
    return str(path)


def test_one_file_is_split_class_by_class_and_its_words_survive(tmp_path):
    file = write_csv(tmp_path / "reviews.csv")
    train, held_out = load_texts(TextDataArguments(train_file=file, eval_fraction=0.2))
    assert (len(train), len(held_out)) == (16, 4)
    names = train.features["label"].names
    assert sorted(names) == ["007", "None", "bad", "good"]
    assert sorted(names[label] for label in held_out["label"]) == sorted(names)
    named = {"very good": "good", "very bad": "bad", "NA": "None", "so so": "007"}
    for row in [*train, *held_out]:
        assert named[row["text"]] == names[row["label"]]
    assert load_texts(TextDataArguments(dataset=file, eval_fraction=0.2))[0]["text"][:] == train["text"][:]


def test_a_validation_file_is_what_is_evaluated_on(tmp_path):
    train_file = write_csv(tmp_path / "a.csv", header=("review", "verdict"))
    validation_file = write_csv(tmp_path / "b.csv", ["bad again"], ["bad"], header=("review", "verdict"))
    args = TextDataArguments(train_file=train_file, validation_file=validation_file, label_column="verdict")
    train, held_out = load_texts(args)
    assert (len(train), held_out["text"][:]) == (20, ["bad again"])
    assert train.features["label"].names[held_out[0]["label"]] == "bad"


@pytest.mark.parametrize(("present", "expected"), [(("dev", "test"), "dev"), (("test",), "test"), ((), None)])
def test_a_folder_is_evaluated_on_validation_then_test_then_a_share(tmp_path, present, expected):
    write_csv(tmp_path / "train.csv")
    for split in present:
        write_csv(tmp_path / f"{split}.csv", [split], ["bad"])
    _, held_out = load_texts(TextDataArguments(dataset=str(tmp_path), eval_fraction=0.2))
    assert held_out["text"][:] == [expected] if expected else len(held_out) == 4


def test_no_more_rows_are_trained_on_than_asked_for(tmp_path):
    args = TextDataArguments(train_file=write_csv(tmp_path / "a.csv"), eval_fraction=0.2, max_train_samples=6)
    train, held_out = load_texts(args)
    assert (len(train), len(held_out)) == (6, 4)
    assert train.unique("label") != [0]


@pytest.mark.parametrize("argument", ["dataset", "train_file", "validation_file"])
@pytest.mark.parametrize("arguments", [TextDataArguments, LMDataArguments, ImageDataArguments])
def test_a_mistyped_path_is_named_as_such(tmp_path, argument, arguments):
    args = arguments(dataset=write_csv(tmp_path / "a.csv"))
    missing = str(tmp_path / "mistyped.csv")
    setattr(args, argument, missing)
    with pytest.raises(ValueError, match=f"`{argument}` is '{missing}', but there is no such file"):
        load_splits(args.dataset, args)


def test_a_folder_in_the_place_of_a_file_is_said_to_be_one(tmp_path):
    with pytest.raises(ValueError, match=r"`train_file` is .*, but that is a folder; give a file, or .* as `dataset`"):
        load_texts(TextDataArguments(train_file=str(tmp_path)))


def test_a_name_that_neither_disk_nor_hub_has_is_said_to_be_that():
    with pytest.raises(ValueError, match="`dataset` is 'nobody/nothing', which is no file or folder here"):
        load_texts(TextDataArguments(dataset="nobody/nothing"))


@pytest.mark.parametrize(("content", "named"), [("", "a file that is empty"), ("text,label\n", "without a row")])
def test_an_empty_file_says_so(tmp_path, content, named):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=f"`train_file` is .*{named}"):
        load_texts(TextDataArguments(train_file=str(tmp_path / "a.csv")))


def test_a_row_without_a_label_is_named(tmp_path):
    with pytest.raises(ValueError, match="Row 2 of the data has no label"):
        load_texts(TextDataArguments(train_file=write_csv(tmp_path / "a.csv", ["a", "b", "c"], ["x", "y", ""])))


def test_images_come_from_train_and_validation_files_too(tmp_path):
    from datasets import Dataset
    from PIL import Image

    for split in ("a", "b"):
        images = [{"bytes": None, "path": str(tmp_path / "image.png")}] * 4
        Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}).to_parquet(tmp_path / f"{split}.parquet")
    Image.new("L", (4, 4)).save(tmp_path / "image.png")
    files = {"train_file": str(tmp_path / "a.parquet"), "validation_file": str(tmp_path / "b.parquet")}
    train, held_out = load_images(ImageDataArguments(**files))
    assert (len(train), len(held_out)) == (4, 4)
    assert held_out[0]["image"].size == (4, 4)


def test_the_last_lines_of_a_text_are_held_out(tmp_path):
    lines = [f"line {number}\n" for number in range(20)]
    (tmp_path / "novel.txt").write_text("".join(lines))
    args = LMDataArguments(train_file=str(tmp_path / "novel.txt"))
    assert load_lines(args) == (lines[:18], lines[18:])
    args.eval_fraction = 0.5
    assert load_lines(args) == (lines[:10], lines[10:])
    args.eval_lines = [3, 4]
    assert load_lines(args) == (lines[:2] + lines[4:], lines[2:4])
    (tmp_path / "other.txt").write_text("another\n")
    args = LMDataArguments(dataset=str(tmp_path / "novel.txt"), validation_file=str(tmp_path / "other.txt"))
    assert load_lines(args) == (lines, ["another\n"])


@pytest.mark.parametrize("wrong", [{"eval_lines": [0, 2]}, {"eval_lines": [1, 3]}, {"eval_fraction": 1.0}])
def test_a_text_keeps_lines_on_both_sides(tmp_path, wrong):
    (tmp_path / "novel.txt").write_text("a\nb\nc\n")
    with pytest.raises(ValueError, match="some of the 3 lines must be held out"):
        load_lines(LMDataArguments(dataset=str(tmp_path / "novel.txt"), **wrong))


def test_lines_of_json_are_text_too(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": f"line {number}"}) for number in range(10)))
    args = LMDataArguments(dataset=str(tmp_path / "a.jsonl"), text_column="body")
    assert load_lines(args)[1] == ["line 9\n"]
    args.text_column = "text"
    with pytest.raises(ValueError, match="`text_column` is 'text', but there are body"):
        load_lines(args)


def test_a_language_model_trains_on_no_more_blocks_than_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text("some words that are here\n" * 80)
    script = ModelArguments(
        train_teacher=True, teacher_config='{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}'
    )
    args = LMDataArguments(train_file=str(tmp_path / "a.txt"), block_size=8, vocab_size=270)
    whole = distill_lm.load_task(script, args)
    args.max_train_samples = 5
    some = distill_lm.load_task(script, args)
    assert (len(some.train_set), len(some.eval_set)) == (5, len(whole.eval_set))
    assert all(block in whole.train_set["input_ids"][:] for block in some.train_set["input_ids"])


def test_texts_without_labels_come_from_a_file_of_lines_or_a_column(tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n\n  \ntwo words\n")
    assert load_unlabelled(TextDataArguments(unlabelled_file=str(lines)))["text"] == ["one", "two words"]
    file = write_csv(tmp_path / "reviews.csv")
    assert load_unlabelled(TextDataArguments(unlabelled_file=file))["text"] == REVIEWS
    assert load_unlabelled(TextDataArguments()) is None
    with pytest.raises(ValueError, match=r"`unlabelled_file` is 'none\.txt', but there is no such file"):
        load_unlabelled(TextDataArguments(unlabelled_file="none.txt"))
    with pytest.raises(ValueError, match="`text_column` is 'body', but the rows of `unlabelled_file` have"):
        load_unlabelled(TextDataArguments(unlabelled_file=file, text_column="body"))
