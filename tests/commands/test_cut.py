"""`hf-blockkd cut`: what it prints and writes, for images and texts in files of every kind, and what it refuses."""

import json
import re

import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Image
from PIL import Image as Picture
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ViTImageProcessorPil

from hf_blockkd.commands.cli import main
from hf_blockkd.commands.rows import CHARACTERS, _windows
from hf_blockkd.models.cut import CUT_NAME, Cut
from hf_blockkd.models.loading import load_model
from hf_blockkd.models.pooling import Pooling

from ..helpers.tiny_models import LABELS, VOCABULARY, tiny_bert, tiny_gpt2, tiny_t5, tiny_vit
from ..helpers.training import assert_same_state, image_rows, make_trainer, state_of

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
WORDS = [*SPECIAL.values(), *(f"w{i}" for i in range(VOCABULARY - len(SPECIAL)))]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@pytest.fixture
def vit(folder):
    saved(tiny_vit(), folder / "vit")
    size = {"height": 8, "width": 8}
    ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder / "vit")
    return str(folder / "vit")


@pytest.fixture
def images(folder):
    """A parquet file of grey images with classes."""
    rows = {"picture": [{"bytes": None, "path": path} for path in pictures(folder / "images")], "kind": [0, 1, 2] * 8}
    table = Dataset.from_dict(rows).cast_column("picture", Image())
    table.cast_column("kind", ClassLabel(names=["a", "b", "c"])).to_parquet(folder / "images.parquet")
    return str(folder / "images.parquet")


@pytest.fixture
def texts(folder):
    """A tsv file of texts with classes, without a header."""
    lines = (f"{' '.join(WORDS[4 + (i * j) % 50] for j in range(1, 4 + i % 5))}\t{i % LABELS}\n" for i in range(40))
    (folder / "texts.tsv").write_text("".join(lines))
    return str(folder / "texts.tsv")


@pytest.fixture
def novel(folder):
    lines = (" ".join(WORDS[4 + (i * j) % 50] for j in range(1, 12)) + "\n" for i in range(300))
    (folder / "novel.txt").write_text("".join(lines))
    return str(folder / "novel.txt")


# ---- What it prints and writes ----


def test_a_student_of_images_is_cut_measured_and_written(folder, vit, images, capsys):
    options = ["--num_layers", "2", "--hidden_size", "8", "--config_overrides", '{"intermediate_size": 10}']
    output = folder / "student"
    assert main(["cut", vit, *options, "--dataset", images, "--output", str(output)]) == 0
    printed = lines_of(capsys.readouterr().out)
    assert printed["layers"] == "2 of 3: 0, 2"
    assert printed["hidden_size"] == "8 of 16"
    assert printed["intermediate_size"] == "10 of 24"
    assert printed["data"].startswith("picture: 12 rows to cut by, 12 held out")
    assert re.fullmatch(r"\d+\.\d{4} nats", printed["KL from teacher"])
    assert re.fullmatch(r"[\d.]+%, teacher [\d.]+%", printed["accuracy"])
    student, info = transformers.AutoModelForImageClassification.from_pretrained(output, output_loading_info=True)
    assert not any(info.values())
    # A trainer that resumes reads the file as it is.
    assert load_file(output / "model.safetensors").keys() == student.state_dict().keys()
    assert printed["parameters"].startswith(f"{student.num_parameters():,} of {tiny_vit().num_parameters():,} (")
    assert Cut.load(output).layers == [0, 2]
    assert len(Cut.load(output).channels) == 8
    assert transformers.AutoImageProcessor.from_pretrained(output, backend="pil").size["height"] == 8


def test_what_takes_long_is_shown_on_stderr(folder, vit, images, capsys):
    options = ["--num_layers", "2", "--hidden_size", "8", "--layers", "kl", "--heal_steps", "2"]
    assert main(["cut", vit, *options, "--dataset", images, "--output", str(folder / "student")]) == 0
    told = capsys.readouterr().err
    for done in (
        "Layers dropped",
        "channels are chosen",
        "Layers fitted",
        "Steps of healing",
        "compared with the teacher",
    ):
        assert re.search(rf"{done}: 100%.* (\d+)/\1 ", told)
    assert "Loading weights" not in told


def test_what_was_written_trains_by_its_name(folder, vit, images):
    output = folder / "student"
    assert main(["cut", vit, "--num_layers", "2", "--dataset", images, "--output", str(output)]) == 0
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = make_trainer(folder / "run", str(output), vit, image_rows(8), **settings)
    assert_same_state(state_of(trainer.model), state_of(load_model(str(output))))
    trainer.train()
    assert Cut.load(folder / "run" / "checkpoint-1") == Cut.load(output)


def test_a_student_gets_the_weights_that_make_student_gives_it(folder, capsys):
    teacher = saved(tiny_bert(), folder / "bert")
    for options in (
        ["--layers", "0,2"],
        ["--layers", "outer", "--num_layers", "1"],
        ["--parameters", "0.5"],
        ["--flops", "0.4"],
    ):
        output = folder / options[1]
        assert main(["cut", str(folder / "bert"), *options, "--output", str(output)]) == 0
        assert load_model(str(output)).num_parameters() < teacher.num_parameters()
    kept = state_of(load_model(str(folder / "0,2")).bert.encoder.layer[1])
    assert_same_state(kept, state_of(teacher.bert.encoder.layer[2]))
    assert "KL" not in capsys.readouterr().out
    assert sorted(path.name for path in (folder / "0,2").iterdir()) == ["config.json", CUT_NAME, "model.safetensors"]


def test_without_rows_a_narrower_student_is_cut_by_weights_with_a_warning(folder, caplog):
    saved(tiny_bert(), folder / "bert")
    assert main(["cut", str(folder / "bert"), "--hidden_size", "8", "--output", str(folder / "student")]) == 0
    assert "channels are chosen by the size of their weights" in caplog.text


def test_rows_are_cut_by_and_fitted_to_unless_told_otherwise(folder, texts):
    bert = with_tokenizer(tiny_bert(), folder / "bert")
    states = []
    for name, more in (("a", []), ("b", ["--no_fit"]), ("c", ["--no_fit", "--channels", "random"])):
        options = ["--hidden_size", "8", "--dataset", texts, *more, "--output", str(folder / name)]
        assert main(["cut", bert, *options]) == 0
        states.append((Cut.load(folder / name).channels, state_of(load_model(str(folder / name)))))
    weight = "bert.encoder.layer.0.output.dense.weight"
    assert states[0][0] == states[1][0] != states[2][0]
    assert not torch.equal(states[0][1][weight], states[1][1][weight])


# ---- Rows of every kind ----


def test_candidates_within_a_budget_are_healed_and_compared_on_rows(folder, texts):
    bert = with_tokenizer(tiny_bert(), folder / "bert")
    states = []
    for name, more in (("a", ["--candidates", "2"]), ("b", ["--candidates", "2", "--heal_steps", "1"])):
        options = ["--parameters", "0.6", "--dataset", texts, *more, "--output", str(folder / name)]
        assert main(["cut", bert, *options]) == 0
        student = load_model(str(folder / name))
        assert student.num_parameters() <= 0.6 * tiny_bert().num_parameters()
        states.append(student.bert.embeddings.word_embeddings.weight)
    assert states[0].shape != states[1].shape or not torch.equal(*states)


def test_a_folder_of_images_is_read(folder, vit, capsys):
    pictures(folder / "images")
    options = ["--num_layers", "2", "--dataset", str(folder / "images"), "--output", str(folder / "student")]
    assert main(["cut", vit, *options]) == 0
    printed = lines_of(capsys.readouterr().out)
    assert printed["data"].startswith("image: 12 rows")
    assert "accuracy" in printed


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".json", ".parquet", ".txt"])
def test_texts_are_read_from_files_of_every_kind(folder, texts, suffix, capsys):
    bert = with_tokenizer(tiny_bert(), folder / "bert")
    rows = [line.split("\t") for line in (folder / "texts.tsv").read_text().splitlines()]
    table = Dataset.from_dict({"text": [row[0] for row in rows], "label": [int(row[1]) for row in rows]})
    path = folder / f"texts{suffix}"
    if suffix == ".txt":
        path.write_text("".join(f"{row[0]}\n" for row in rows))
    elif suffix != ".tsv":
        getattr(table, f"to_{suffix[1:]}")(str(path))
    assert main(["cut", bert, "--num_layers", "2", "--dataset", str(path), "--output", str(folder / "s")]) == 0
    printed = lines_of(capsys.readouterr().out)
    assert printed["data"].startswith("text: 20 rows to cut by, 20 held out")
    assert ("accuracy" in printed) == (suffix != ".txt")


@pytest.mark.parametrize("build", [tiny_gpt2, lambda: tiny_bert("MaskedLM")], ids=["causal", "masked"])
def test_language_models_are_measured_by_their_perplexity(folder, novel, build, capsys):
    teacher = with_tokenizer(build(), folder / "lm")
    options = ["--num_layers", "2", "--max_examples", "16", "--max_length", "8"]
    assert main(["cut", teacher, *options, "--dataset", novel, "--output", str(folder / "s")]) == 0
    printed = lines_of(capsys.readouterr().out)
    assert printed["data"].startswith("text: 16 rows to cut by, 16 held out")
    assert re.fullmatch(r"[\d.]+, teacher [\d.]+", printed["perplexity"])


@pytest.mark.parametrize("build", [tiny_bert, tiny_t5], ids=["pairs", "translation"])
def test_two_columns_are_a_pair_of_texts_or_a_source_and_its_target(folder, texts, build, capsys):
    teacher = with_tokenizer(build(), folder / "teacher")
    lines = [line.split("\t")[0] for line in (folder / "texts.tsv").read_text().splitlines()]
    Dataset.from_dict({"one": lines, "other": lines[::-1], "id": lines}).to_csv(str(folder / "pairs.csv"))
    options = ["--dataset", str(folder / "pairs.csv"), "--output", str(folder / "student")]
    command = ["cut", teacher, "--num_layers", "2", *options]
    assert "3 columns of strings (one, other, id), but the model takes 1 or 2" in refused(capsys, command)
    assert main([*command, "--column", "one", "other"]) == 0
    assert lines_of(capsys.readouterr().out)["data"].startswith("one and other: 20 rows")


def test_classes_are_matched_by_name_where_both_sides_have_the_same(folder, vit, images, capsys):
    """In another order, and with a teacher that knows more of them."""
    config = json.loads((folder / "vit" / "config.json").read_text())
    accuracies = []
    for names in ("abcde", "cabde"):
        fields = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        (folder / "vit" / "config.json").write_text(json.dumps({**config, **fields}))
        assert main(["cut", vit, "--dataset", images, "--output", str(folder / names)]) == 0
        accuracies.append(lines_of(capsys.readouterr().out)["accuracy"])
    assert accuracies[0] != accuracies[1]


# ---- Where it is written ----


def test_a_folder_with_something_else_is_not_overwritten(folder, capsys):
    saved(tiny_bert(), folder / "bert")
    (folder / "full").mkdir()
    (folder / "full" / "note").write_text("mine")
    command = ["cut", str(folder / "bert"), "--num_layers", "2", "--output", str(folder / "full")]
    assert "holds something else than an untrained cut" in refused(capsys, command)
    assert [path.name for path in (folder / "full").iterdir()] == ["note"]
    assert main([*command, "--overwrite"]) == 0
    assert main(command) == 0  # over the cut
    (folder / "full" / "training_args.json").write_text("{}")
    assert "holds something else than an untrained cut" in refused(capsys, command)
    assert (folder / "full" / "note").read_text() == "mine"


def test_the_teacher_is_not_overwritten(folder, capsys):
    saved(tiny_bert(), folder / "bert")
    command = ["cut", str(folder / "bert"), "--num_layers", "2", "--output", str(folder / "bert"), "--overwrite"]
    assert "the teacher's own folder" in refused(capsys, command)
    assert load_model(str(folder / "bert")).config.num_hidden_layers == 3


def test_a_file_is_no_output(folder, capsys):
    (folder / "file").write_text("")
    assert "is a file; name a folder" in refused(capsys, ["cut", "bert", "--output", str(folder / "file")])


def test_a_tokenizer_is_written_as_it_lay_beside_the_teacher(folder, texts):
    bert = with_tokenizer(tiny_bert(), folder / "bert")
    options = ["--num_layers", "2", "--max_length", "5", "--dataset", texts, "--output", str(folder / "student")]
    assert main(["cut", bert, *options]) == 0
    first, second = (json.loads((folder / name / "tokenizer.json").read_text()) for name in ("bert", "student"))
    assert first == second


# ---- What it refuses ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "some"], "`layers` is 'some'; choose 'even'"),
        (["--layers", "2,1"], r"`layers` is \[2, 1\], but must be a rising list"),
        (["--layers", "kl", "--num_layers", "2"], "needs `data`"),
        (["--num_layers", "9"], "`num_layers` is 9"),
        (["--parameters", "1e12"], "`parameters` is"),
        (["--config_overrides", "{x"], "which is no JSON"),
        (["--config_overrides", "[1]"], "must be a JSON object"),
        (["--config_overrides", '{"num_layers": 2}'], "names 'num_layers', which `make_student` takes itself"),
        (["--config_overrides", '{"nothing": 2}'], "`nothing` is no field of BertConfig"),
        (["--dataset", "none.tsv"], "there is no such file or folder"),
        (["--dataset", "./none"], "there is no such file or folder"),
        (["--dataset", __file__], r"a file must end in \.parquet"),
        (["--dataset", "TEXTS", "--split", "test"], "Unknown split"),
        (["--dataset", "TEXTS", "--column", "words"], "`column` is words, but the data set has text, label"),
        (["--dataset", "TEXTS", "--column", "label"], "does not run on rows of label"),
        (["--dataset", "TEXTS", "--max_examples", "7"], "`max_examples` is 7"),
        (["--dataset", "TEXTS", "--max_length", "0"], "`max_length` is 0"),
        (["--dataset", "TEXTS", "--split", "train[:10]"], "Rows that the data set gives: 10"),
        (["--dataset", "IMAGES"], r"no columns of strings \(picture, kind\)"),
        (["--dataset", "BROKEN"], "which cannot be read"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(
    folder, texts, images, options, message, capsys
):
    bert = with_tokenizer(tiny_bert(), folder / "bert")
    (folder / "broken.json").write_text('{"text": ')
    files = {"TEXTS": texts, "IMAGES": images, "BROKEN": str(folder / "broken.json")}
    options = [files.get(option, option) for option in options]
    assert re.search(message, refused(capsys, ["cut", bert, *options, "--output", str(folder / "student")]))
    assert not (folder / "student").exists()


def test_rows_without_what_prepares_them_are_refused(folder, vit, texts, images, capsys):
    """Without a vocabulary, transformers would make a tokenizer that knows no word."""
    saved(tiny_bert(), folder / "bert")
    (folder / "vit" / "preprocessor_config.json").unlink()
    for teacher, data, missing in (
        (str(folder / "bert"), texts, "no tokenizer (tokenizer.json)"),
        (vit, images, "no image processor (preprocessor_config.json)"),
    ):
        message = refused(capsys, ["cut", teacher, "--dataset", data, "--output", str(folder / "student")])
        assert f"There is {missing} beside the teacher" in message


def test_columns_that_are_no_images_are_refused(folder, vit, images, texts, capsys):
    command = ["cut", vit, "--output", str(folder / "student"), "--dataset"]
    assert "no columns of images (text, label)" in refused(capsys, [*command, texts])
    assert "`column` is 'kind', which holds no images" in refused(capsys, [*command, images, "--column", "kind"])


def test_a_tokenizer_of_another_model_is_refused(folder, texts, capsys):
    bert = with_tokenizer(tiny_bert(vocab_size=20), folder / "bert")
    message = refused(capsys, ["cut", bert, "--dataset", texts, "--output", str(folder / "student")])
    assert "BertForSequenceClassification does not run on rows of text (index out of range" in message


def test_models_that_take_more_than_a_text_are_refused(folder, texts, capsys):
    bert = with_tokenizer(tiny_bert("MultipleChoice"), folder / "bert")
    message = refused(capsys, ["cut", bert, "--dataset", texts, "--output", str(folder / "student")])
    assert "BertForMultipleChoice takes more than an image or a text" in message


# ---- Helpers ----


def saved(model: PreTrainedModel, path) -> PreTrainedModel:
    model.save_pretrained(path)
    return model


def with_tokenizer(model: PreTrainedModel, path) -> str:
    saved(model, path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<mask>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(path)
    return str(path)


def pictures(path) -> list[str]:
    """A folder with a folder of grey images for each of three classes."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for i in range(24):
        file = path / "abc"[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Picture.fromarray(torch.randint(256, (9, 9), generator=generator, dtype=torch.uint8).numpy()).save(file)
        paths.append(str(file))
    return paths


def lines_of(printed: str) -> dict[str, str]:
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in printed.splitlines())


def refused(capsys, argv: list[str]) -> str:
    """One line on stderr, nothing on stdout, exit code 1."""
    capsys.readouterr()
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("num_windows", [1, 3, 100])
@pytest.mark.parametrize("widths", [[40], [3, 0, 7, 1], [1, 90]])
def test_windows_lie_evenly_in_the_running_text(num_windows, widths):
    lines = [chr(97 + i % 26) * widths[i % len(widths)] + "\n" * (i % 2) for i in range(60)]

    def letters(text: str, **options) -> dict[str, list[str]]:
        return {"input_ids": list(text)[: options["max_length"]]}

    text, length = "\n".join(line.rstrip("\n") for line in lines), CHARACTERS * 4
    count = min(num_windows, len(text) // length)
    starts = [i * len(text) // count for i in range(count)]
    expected = [list(text[start : start + 4]) for start in starts]
    assert _windows(lines, letters, num_windows, {"max_length": 4}) == expected


def test_a_model_of_sentence_transformers_is_cut_into_one(folder, texts, capsys):
    with_tokenizer(tiny_bert(None), folder / "bert")
    Pooling(("cls",), normalize=True).save(folder / "bert", 16)
    argv = ["cut", str(folder / "bert"), "--output", str(folder / "small"), "--dataset", texts]
    assert main([*argv, "--num_layers", "2", "--hidden_size", "8"]) == 0
    assert "from the teacher's, squared" in capsys.readouterr().out
    assert load_model(str(folder / "small")).pooling == Pooling(("cls",), normalize=True)
    settings = ["--student", str(folder / "small"), "--teacher", str(folder / "bert"), "--num_blocks", "2"]
    assert main(["plan", *settings]) == 0
    assert "connector" in capsys.readouterr().out
