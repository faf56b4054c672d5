"""A folder of a stranger holds numbers and names, and nothing in it runs or asks to be run."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from hf_blockkd import make_student
from hf_blockkd.models.cut import CUT_NAME
from hf_blockkd.models.loading import load_model
from hf_blockkd.pairing.vocabularies import check_vocabularies

from ..helpers.tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_vit
from ..helpers.training import make_trainer, text_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mark(tmp_path):
    """What a stranger's code would write."""
    return tmp_path / "it ran"


def bring_code(folder, mark, **model_type):
    """Let every file of a model's folder name code of its own, which is there."""
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Strange: pass\n")
    code = {"AutoConfig": "code.Strange", "AutoTokenizer": ["code.Strange", "code.Strange"]}
    code |= {"AutoProcessor": "code.Strange", "AutoImageProcessor": "code.Strange"}
    code |= {name: "code.Strange" for name in dir(transformers) if name.startswith("AutoModel")}
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "auto_map": code, **model_type}))
    for name, fields in {
        "tokenizer_config.json": {"tokenizer_class": "Strange"},
        "preprocessor_config.json": {"image_processor_type": "Strange"},
        "generation_config.json": {"custom_generate": "code"},
    }.items():
        (folder / name).write_text(json.dumps({**fields, "auto_map": code}))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text((folder / "code.py").read_text())


@pytest.mark.parametrize("config_only", [False, True])
@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2, tiny_llama])
def test_a_model_that_transformers_knows_is_loaded_without_the_code_beside_it(tmp_path, mark, build, config_only):
    build().save_pretrained(tmp_path)
    bring_code(tmp_path, mark)
    assert type(load_model(str(tmp_path), config_only)) is type(build())
    assert not mark.exists()


@pytest.mark.parametrize("config_only", [False, True])
def test_one_that_needs_its_code_is_refused(tmp_path, mark, config_only):
    tiny_bert().save_pretrained(tmp_path)
    bring_code(tmp_path, mark, model_type="strange", architectures=["StrangeForCausalLM"])
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(tmp_path), config_only)
    assert not mark.exists()


def test_the_tokenizer_beside_a_model_is_read_without_its_code(tmp_path, mark):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    bring_code(folder, mark)
    model = load_model(str(folder))
    check_vocabularies(model, model)
    assert not mark.exists()


def test_nobody_is_asked_in_a_process_with_a_terminal(tmp_path, mark):
    """Input that says yes is at hand; whoever asks gets it."""
    tiny_llama().save_pretrained(tmp_path)
    bring_code(tmp_path, mark)
    run = f"""
from hf_blockkd.models.loading import load_model
from hf_blockkd.pairing.vocabularies import check_vocabularies
model = load_model({str(tmp_path)!r})
check_vocabularies(model, model)
"""
    done = subprocess.run(
        [sys.executable, "-c", run], input="y\n" * 9, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert not mark.exists()


def test_every_call_that_could_run_a_folders_code_says_that_it_must_not():
    """Of package and examples; `True` nowhere, and left open nowhere."""
    sources = [*ROOT.glob("hf_blockkd/**/*.py"), *ROOT.glob("examples/**/*.py")]
    calls = [
        (path.name, node)
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "from_pretrained"
    ]
    assert len(calls) > 5
    for name, call in calls:
        said = {keyword.arg: keyword.value for keyword in call.keywords}
        assert "trust_remote_code" in said, f"{name}, line {call.lineno}"
        assert ast.literal_eval(said["trust_remote_code"]) is False


# ---- What a student was cut from ----


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_student_is_loaded_with_its_cut(tmp_path, as_type):
    student = make_student(tiny_bert(), layers=[0, 2], hidden_size=8)
    student.save_pretrained(tmp_path)
    student.cut.save(tmp_path)
    assert load_model(str(as_type(tmp_path))).cut == student.cut
    trainer = make_trainer(tmp_path / "run", as_type(tmp_path), tiny_bert(), text_rows(4))
    assert trainer.model.cut == student.cut


def test_a_model_that_was_not_cut_has_no_cut(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    assert not hasattr(load_model(str(tmp_path)), "cut")


def test_random_weights_were_not_cut(tmp_path):
    student = make_student(tiny_bert(), num_layers=2)
    student.save_pretrained(tmp_path)
    student.cut.save(tmp_path)
    assert not hasattr(load_model(str(tmp_path), config_only=True), "cut")


def test_a_file_that_holds_no_cut_is_named(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    (tmp_path / CUT_NAME).write_text("{}")
    with pytest.raises(ValueError, match=r"cut.json holds no cut .* delete it, or cut the student again"):
        load_model(str(tmp_path))


# ---- Names of classes ----


@pytest.mark.parametrize(
    "architectures",
    [
        *([name] for name in ("Trainer", "pipeline", "logging", "BertConfig", "BertTokenizer", "AutoModel")),
        *([name] for name in ("AutoModelForMaskedLM", "PreTrainedModel", "BertPreTrainedModel", "__name__", "os")),
        *([], None, [None], [5], [["BertModel"]], {"BertModel": 1}, "Trainer"),
    ],
    ids=str,
)
@pytest.mark.parametrize("config_only", [False, True])
def test_a_name_that_is_no_model_class_is_refused(tmp_path, architectures, config_only):
    tiny_bert().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(ValueError, match="in `architectures`, which is no model class of transformers; name one there"):
        load_model(str(tmp_path), config_only)


@pytest.mark.parametrize("head", ["Model", "ForPreTraining", "ForMaskedLM", "LMHeadModel", "ForTokenClassification"])
def test_models_of_every_auto_class_are_loaded_headless_ones_too(tmp_path, head):
    model = getattr(transformers, f"Bert{head}")(tiny_bert().config)
    model.save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path))) is type(model)


class OwnConfig(transformers.BertConfig):
    model_type = "own-bert"


class OwnForSequenceClassification(transformers.BertForSequenceClassification):
    config_class = OwnConfig


def test_a_class_that_the_person_registered_is_theirs(tmp_path):
    AutoConfig.register("own-bert", OwnConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(OwnConfig, OwnForSequenceClassification, exist_ok=True)
    model = OwnForSequenceClassification(OwnConfig(**{**tiny_bert().config.to_diff_dict(), "model_type": "own-bert"}))
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded) is OwnForSequenceClassification
    assert isinstance(loaded, PreTrainedModel)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


def test_an_image_model_is_loaded_without_the_code_beside_it(tmp_path, mark):
    tiny_vit().save_pretrained(tmp_path)
    bring_code(tmp_path, mark)
    assert type(load_model(str(tmp_path))) is type(tiny_vit())
    assert not mark.exists()
