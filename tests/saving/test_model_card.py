"""The card of a saved student: valid for the hub, true of the weights beside it, and never a person's work undone."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from datasets import Dataset, DatasetInfo
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from peft import LoraConfig
from PIL import Image
from transformers import TrainerState

from hf_blockkd import make_student
from hf_blockkd.saving.last_evaluation import last_evaluation
from hf_blockkd.saving.model_card import MARK, _dataset_on_hub, is_ours

from ..helpers.tiny_models import VOCABULARY, build, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit, word_tokenizer
from ..helpers.training import image_rows, make_trainer, text_rows, token_rows


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def vit_trainer(folder, **settings):
    teacher = tiny_vit()
    teacher.config.name_or_path = "someone/a-teacher"
    student = make_student(teacher, num_layers=2, hidden_size=8)
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_stepping_stones": True, **settings}
    rows = {"eval_dataset": image_rows(8, seed=1), "compute_metrics": accuracy}
    trainer = make_trainer(folder, student, teacher, image_rows(), **rows, **settings)
    trainer.processing_class = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})
    return trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trainer whose student was evaluated, beside its teacher, and saved."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "small-vit"
    trainer = vit_trainer(folder)
    trainer.train()
    trainer.save_model()
    return trainer, folder


def last_metrics(trainer):
    return {
        key: value for entry in trainer.state.log_history for key, value in entry.items() if key.startswith("eval_")
    }


# ---- What the hub reads ----


def test_the_metadata_are_what_the_hub_reads(saved):
    _, folder = saved
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert metadata_load(folder / "README.md") == data
    assert ModelCardData(**data).to_dict() == data
    assert yaml.safe_load(card.data.to_yaml()) == data
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-classification"
    assert data["base_model"] == "someone/a-teacher"
    assert data["metrics"] == ["accuracy"]
    assert {"knowledge-distillation", "hf-blockkd", "generated_from_trainer"} <= {*data["tags"]}


def test_the_model_index_holds_the_metrics_of_student_and_teacher(saved):
    trainer, folder = saved
    index = metadata_load(folder / "README.md")["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == "small-vit"
    assert all(isinstance(one, EvalResult) for one in results)
    assert eval_results_to_model_index(name, results) == index
    found, expected = {one.metric_type: one.metric_value for one in results}, last_metrics(trainer)
    assert found == {
        "loss": round(expected["eval_loss"], 6),
        "accuracy": expected["eval_accuracy"],
        "teacher_loss": round(expected["eval_teacher_loss"], 6),
        "teacher_accuracy": expected["eval_teacher_accuracy"],
    }


def test_a_local_path_is_neither_a_base_model_nor_told(tmp_path):
    teacher = tiny_vit()
    (tmp_path / "secret" / "my teacher").mkdir(parents=True)
    teacher.config.name_or_path = str(tmp_path / "secret" / "my teacher")
    trainer = make_trainer(tmp_path / "run", tiny_vit(num_hidden_layers=2), teacher)
    trainer.save_model()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "`my teacher`" in text
    assert "secret" not in text
    assert "base_model" not in metadata_load(tmp_path / "run" / "README.md")


def test_data_that_came_from_the_hub_are_named():
    source = "hf://datasets/uoft-cs/cifar10@0b2714987fa478483af9968de7c934580d0bb9a2/x.parquet"
    rows = Dataset.from_dict({"label": [0]}, info=DatasetInfo(download_checksums={source: {}}))
    assert _dataset_on_hub(rows.select([0])) == "uoft-cs/cifar10"
    assert _dataset_on_hub(image_rows()) is None


# ---- What a person reads ----


def test_the_card_tells_of_models_method_cut_and_results(saved):
    trainer, folder = saved
    text = (folder / "README.md").read_text()
    assert f"with 2 layers and {trainer.model.num_parameters():,} parameters" in text
    assert f"with 3 layers and {trainer.teacher.num_parameters():,} parameters" in text
    assert str(trainer.block_map) in text
    assert "layers 0, 2 (counted from 0) of the teacher's 3" in text
    assert "| `vit.layers.*.mlp.fc1.weight` | 0 | 24 | 12 |" in text
    assert "\n- temperature: 2\n" in text
    assert "\n- stone_weight: 1\n" in text  # what the default came to in this run
    assert "| metric | student | stone 1 | stone 2 | teacher |" in text
    assert "arxiv.org/abs/2411.01547" in text
    assert "![" not in text


@pytest.mark.parametrize(
    ("config", "stones"), [({"state_blocks": "last_two"}, "none"), ({}, "[1, 2]"), ({"objective": "kd"}, "none")]
)
def test_the_card_says_which_stones_ran(tmp_path, config, stones):
    trainer = vit_trainer(tmp_path / "run", stepping_stones="auto", **config)
    trainer.train()
    trainer.save_model(tmp_path / "student")
    text = (tmp_path / "student" / "README.md").read_text()
    assert f"\n- stepping_stones: {stones}\n" in text
    assert ("\n- stone_weight: " in text) == (stones != "none")


def test_a_card_of_training_counts_no_connectors(tmp_path):
    trainer = vit_trainer(tmp_path / "run", save_strategy="steps", save_steps=1)
    trainer.train()
    text = (tmp_path / "run" / "checkpoint-1" / "README.md").read_text()
    assert f"with 2 layers and {trainer.model.num_parameters():,} parameters" in text
    assert "After 1 of 2 steps" in text
    assert "\n# run\n" in text


def test_a_picture_of_the_report_is_shown_where_it_lies(saved, tmp_path):
    trainer, _ = saved
    (tmp_path / "losses.png").write_bytes(b"a picture")
    trainer.save_model(str(tmp_path))
    assert "![losses.png](losses.png)" in (tmp_path / "README.md").read_text()


def test_two_saves_of_one_student_give_the_same_card(saved, tmp_path):
    trainer, folder = saved
    trainer.save_model(str(tmp_path))
    assert (tmp_path / "README.md").read_bytes() == (folder / "README.md").read_bytes()


# ---- Which evaluation it tells of ----

LOG = [
    {"step": 1, "eval_accuracy": 0.9, "eval_runtime": 3.0},
    {"step": 2, "eval_accuracy": 0.5, "eval_teacher_accuracy": float("nan")},
    {"step": 2, "train_runtime": 9.0},
]


@pytest.mark.parametrize(
    ("log", "best", "expected"),
    [
        ([], False, (None, {})),
        (LOG, False, (2, 0.5)),
        (LOG, True, (1, 0.9)),
        (LOG[:2], True, (2, 0.5)),  # in training, when the best weights are not yet back
        ([*LOG, {"step": 2, "eval_accuracy": 0.7}], True, (2, 0.7)),
    ],
)
def test_metrics_belong_to_the_weights_that_the_trainer_holds(tmp_path, log, best, expected):
    state = TrainerState(log_history=log, best_global_step=1)
    args = transformers.TrainingArguments(
        str(tmp_path), eval_strategy="steps", save_strategy="steps", load_best_model_at_end=best, report_to="none"
    )
    step, table = last_evaluation(state, args)
    assert (step, table and table[""]["accuracy"]["student"]) == expected
    assert all({*values} == {"student"} for values in table.get("", {}).values())


def test_several_data_sets_are_told_apart(tmp_path):
    rows = {"clean": image_rows(4), "clean_but_small": image_rows(4, seed=1)}
    trainer = make_trainer(
        tmp_path, tiny_vit(num_hidden_layers=2), tiny_vit(), eval_dataset=rows, compute_metrics=accuracy
    )
    metrics = trainer.evaluate()
    trainer.create_model_card()
    _, results = model_index_to_eval_results(metadata_load(tmp_path / "README.md")["model-index"])
    found = {one.dataset_name: one.metric_value for one in results if one.metric_type == "accuracy"}
    assert found == {name: metrics[f"eval_{name}_accuracy"] for name in rows}


def test_metrics_of_the_teachers_head_are_not_given_as_the_students(tmp_path):
    trainer = make_trainer(
        tmp_path, tiny_vit(num_hidden_layers=2), tiny_vit(), eval_dataset=image_rows(4), objective="simkd"
    )
    trainer.evaluate()
    trainer.create_model_card()
    assert "model-index" not in metadata_load(tmp_path / "README.md")
    assert "student's blocks under the teacher's head" in (tmp_path / "README.md").read_text()


# ---- Whose it is ----


def test_a_card_that_a_person_wrote_or_changed_stays(saved, tmp_path, caplog):
    trainer, _ = saved
    card = tmp_path / "README.md"
    for theirs in ("# Mine\n", "---\nlicense: mit\n---\n\n# Mine\n"):
        card.write_text(theirs)
        trainer.save_model(str(tmp_path))
        assert card.read_text() == theirs
    card.unlink()
    trainer.save_model(str(tmp_path))
    theirs = card.read_text().replace("## How to use it", "## How you use it")
    card.write_text(theirs)
    trainer.save_model(str(tmp_path))
    assert card.read_text() == theirs
    assert "is kept as it is" in caplog.text


def test_what_was_given_for_a_card_stays_with_the_next_save(saved, tmp_path):
    trainer, _ = saved
    trainer.args.output_dir, before = str(tmp_path / "small-vit"), trainer.args.output_dir
    try:
        trainer.create_model_card(license="mit", language="en", tags="tiny", dataset_tags="me/noise", dataset="Noise")
        path = tmp_path / "small-vit" / "README.md"
        first = metadata_load(path)
        assert first["model-index"][0]["results"][0]["dataset"] == {"name": "Noise", "type": "me/noise"}
        trainer.save_model()
    finally:
        trainer.args.output_dir = before
    again = metadata_load(path)
    for key in ("license", "language", "datasets", "tags"):
        assert again[key] == first[key]
    assert is_ours(path.read_text())
    assert again["datasets"] == ["me/noise"]
    assert "tiny" in again["tags"]


def test_an_adapter_gets_the_same_kind_of_card(tmp_path):
    base = tiny_bert()
    base.config.name_or_path = "someone/a-base"
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    trainer = make_trainer(tmp_path, base, None, text_rows(), peft_config=config)
    for _ in range(2):
        trainer.save_model()
        data = metadata_load(tmp_path / "README.md")
        assert data["library_name"] == "peft"
        assert data["base_model"] == "someone/a-base"
        assert "lora" in data["tags"]
        assert is_ours((tmp_path / "README.md").read_text())
    (tmp_path / "README.md").write_text("# Mine\n")
    trainer.save_model()
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_a_push_brings_the_card_along(tmp_path, monkeypatch):
    trainer = vit_trainer(tmp_path / "run")
    pushed = {}

    class Hub:
        def upload_folder(self, folder_path, **kwargs):
            pushed["card"] = Path(folder_path, "README.md").read_text()

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer.hub_model_id, trainer.push_in_progress = "someone/a-student", None
    trainer.push_to_hub(license="mit", model_name="a-student")
    assert "\n# a-student\n" in pushed["card"]
    assert ModelCard(pushed["card"]).data.license == "mit"


# ---- How the student is used ----


def snippet(folder):
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]


@pytest.mark.parametrize("kind", ["image", "grey", "class", "masked", "language", "body", "no processor"])
def test_the_snippet_runs_as_it_stands(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    tokenizer = word_tokenizer(VOCABULARY, pad_token="<unk>", mask_token="w9")
    models, rows = {
        "image": (lambda **config: tiny_vit(num_channels=3, **config), image_rows()),
        "grey": (tiny_vit, image_rows()),
        "class": (tiny_bert, text_rows()),
        "masked": (lambda **config: tiny_bert("MaskedLM", **config), token_rows()),
        "language": (tiny_llama, token_rows()),
        "body": (lambda **config: build("ViT", None, tiny_vit().config.to_diff_dict(), config), image_rows()),
        "no processor": (tiny_gpt2, token_rows()),
    }[kind]
    trainer = make_trainer("student", models(num_hidden_layers=2), models(), rows)
    if kind in ("image", "grey", "body"):
        trainer.processing_class = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})
        Image.new("L", (8, 8)).save("image.png")
    elif kind != "no processor":
        trainer.processing_class = tokenizer
    trainer.save_model()
    code = snippet(tmp_path / "student")
    assert ("pipeline(" in code) == (kind not in ("grey", "body", "no processor"))
    assert "hf_blockkd" not in code
    scope = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, scope)
    assert bool(printed.getvalue()) == ("pipeline(" in code)
    assert MARK.split("{}")[0] in (tmp_path / "student" / "README.md").read_text()
