"""What is saved is a plain student, which loads without any code of ours."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig

from hf_blockkd import BlockwiseDistillTrainer, make_student
from hf_blockkd.connectors.attached import CONNECTORS_NAME, MODULE_NAME
from hf_blockkd.models.cut import CUT_NAME, Cut
from hf_blockkd.saving.checkpoints import MANIFEST_NAME, flaw
from hf_blockkd.saving.settings import RESOLVED_NAME

from ..helpers.tiny_models import (
    tiny_bart,
    tiny_beit,
    tiny_bert,
    tiny_deit,
    tiny_dinov2,
    tiny_gpt2,
    tiny_gpt_neox,
    tiny_llama,
    tiny_t5,
    tiny_vit,
)
from ..helpers.training import (
    assert_same_state,
    batch_of,
    image_rows,
    make_trainer,
    state_of,
    text_rows,
    token_rows,
    with_connectors,
)

STUDENTS = {
    "vit": (tiny_vit, "num_hidden_layers", image_rows, "AutoModelForImageClassification"),
    "deit": (tiny_deit, "num_hidden_layers", image_rows, "AutoModelForImageClassification"),
    "beit": (tiny_beit, "num_hidden_layers", image_rows, "AutoModelForImageClassification"),
    "dinov2": (tiny_dinov2, "num_hidden_layers", image_rows, "AutoModelForImageClassification"),
    "bert": (tiny_bert, "num_hidden_layers", text_rows, "AutoModelForSequenceClassification"),
    "llama": (tiny_llama, "num_hidden_layers", token_rows, "AutoModelForCausalLM"),
    "gpt-neox": (tiny_gpt_neox, "num_hidden_layers", token_rows, "AutoModelForCausalLM"),
    "gpt2": (tiny_gpt2, "n_layer", token_rows, "AutoModelForCausalLM"),
    "t5": (tiny_t5, "num_decoder_layers", token_rows, "AutoModelForSeq2SeqLM"),
    "bart": (tiny_bart, "decoder_layers", token_rows, "AutoModelForSeq2SeqLM"),
}

BARE_PROCESS = """
import json, sys
sys.modules["hf_blockkd"] = None
try:
    import hf_blockkd
except ImportError:
    pass
else:
    raise SystemExit("hf_blockkd was to be blocked")
import torch, transformers
for folder, auto_class in json.loads(sys.argv[1]):
    model, info = getattr(transformers, auto_class).from_pretrained(folder, output_loading_info=True)
    faults = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    expected = torch.load(f"{folder}/../expected.pt")
    state = model.state_dict()
    same = state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
    print(json.dumps([faults, same]))
"""


def student_state(trainer):
    return {n: t for n, t in state_of(trainer.model).items() if not n.startswith(f"{MODULE_NAME}.")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One trained student of each family, with a checkpoint, saved in three ways."""
    torch.manual_seed(0)
    trainers = {}
    for name, (build, depth, rows, _) in STUDENTS.items():
        folder = tmp_path_factory.mktemp(name)
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
        trainer = make_trainer(folder, build(**{depth: 2}), build(), rows(8), **settings)
        trainer.train()
        trainer.save_model(str(folder / "saved"))
        trainer.model.save_pretrained(str(folder / "direct"))
        torch.save(student_state(trainer), folder / "expected.pt")
        trainers[name] = (folder, trainer)
    return trainers


@pytest.mark.parametrize("kind", ["checkpoint-2", "saved", "direct"])
@pytest.mark.parametrize("name", STUDENTS)
def test_the_auto_class_finds_every_key_and_every_weight(runs, name, kind):
    folder, trainer = runs[name]
    auto_class = getattr(transformers, STUDENTS[name][-1])
    model, info = auto_class.from_pretrained(folder / kind, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    assert type(model) is type(trainer.model)
    assert_same_state(state_of(model), student_state(trainer))


def test_a_process_without_hf_blockkd_loads_the_same_students(runs):
    folders = [
        (str(folder / kind), STUDENTS[name][-1])
        for name, (folder, _) in runs.items()
        for kind in ("checkpoint-2", "saved", "direct")
    ]
    done = subprocess.run(
        [sys.executable, "-c", BARE_PROCESS, json.dumps(folders)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [[{}, True]] * len(folders)


@pytest.mark.parametrize("name", STUDENTS)
def test_no_file_holds_a_weight_of_the_teacher(runs, name):
    folder, trainer = runs[name]
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "expected.pt"]
    weights = [p.detach().contiguous().numpy().tobytes() for p in trainer.teacher.parameters() if p.numel() >= 16]
    own = next(p for p in trainer.model.parameters() if p.numel() >= 16).detach().contiguous().numpy().tobytes()
    contents = {path.name: path.read_bytes() for path in sorted(files)}
    assert own in contents["model.safetensors"]
    for path in files:
        content = path.read_bytes()
        assert not any(weight in content for weight in weights), path.name


def test_a_checkpoint_holds_the_connectors_in_a_file_of_their_own_and_no_pickled_arguments(runs):
    folder, trainer = runs["vit"]
    for kind in ("checkpoint-2", "saved"):
        assert_same_state(load_file(folder / kind / CONNECTORS_NAME), state_of(trainer.connectors))
        assert not any(name.startswith(MODULE_NAME) for name in load_file(folder / kind / "model.safetensors"))
        assert not list((folder / kind).rglob("training_args.bin"))
        arguments = json.loads((folder / kind / "training_args.json").read_text())
        assert (arguments["num_blocks"], arguments["temperature"]) == (2, 2.0)
        assert json.loads((folder / kind / RESOLVED_NAME).read_text()) == trainer.objective.resolved(trainer.pair)
    assert not (folder / "direct" / CONNECTORS_NAME).exists()


def test_the_optimizer_knows_student_and_connectors_alone(runs):
    folder, trainer = runs["vit"]
    state = torch.load(folder / "checkpoint-2" / "optimizer.pt")
    moments = sum(entry["exp_avg"].numel() for entry in state["state"].values())
    with with_connectors(trainer):
        assert moments == sum(parameter.numel() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("by_name", ["student", "teacher"])
def test_models_given_by_folder_are_loaded_with_their_heads(tmp_path, runs, by_name):
    folder = str(runs["vit"][0] / "saved")
    models = {"student": tiny_vit(), "teacher": tiny_vit(), by_name: folder}
    trainer = make_trainer(tmp_path, models["student"], models["teacher"], image_rows(4), max_steps=1)
    loaded = trainer.model if by_name == "student" else trainer.teacher
    weights = {name: tensor for name, tensor in state_of(loaded).items() if not name.startswith(MODULE_NAME)}
    assert_same_state(weights, student_state(runs["vit"][1]))
    trainer.train()


def test_the_config_of_a_saved_student_is_that_of_a_plain_model(runs):
    folder, _ = runs["bert"]
    config = AutoConfig.from_pretrained(folder / "saved")
    assert config.architectures == ["BertForSequenceClassification"]
    assert config.num_hidden_layers == 2
    assert "block" not in (folder / "saved" / "config.json").read_text()


# ---- The record of a cut ----


@pytest.fixture(params=["full", "lora"])
def cut_run(request, tmp_path):
    """A student that was cut out of its teacher, trained with and without an adapter."""
    teacher = tiny_vit()
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if request.param == "lora" else None

    def train(folder, student, **resume):
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2}
        trainer = make_trainer(folder, student, teacher, image_rows(8), peft_config=copy.copy(adapter), **settings)
        trainer.train(**resume)
        return trainer

    return make_student(teacher, layers=[0, 2], hidden_size=8), train


def test_a_trained_student_keeps_the_record_of_its_cut(cut_run, tmp_path):
    student, train = cut_run
    cut = student.cut
    trainer = train(tmp_path / "run", student)
    trainer.save_model(str(tmp_path / "saved"))
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert Cut.load(checkpoint) == Cut.load(tmp_path / "saved") == cut
    assert CUT_NAME in json.loads((checkpoint / MANIFEST_NAME).read_text())["files"]
    (checkpoint / CUT_NAME).write_text("{}")
    assert CUT_NAME in flaw(checkpoint)


def test_a_run_with_a_record_resumes_to_the_bit(cut_run, tmp_path):
    student, train = cut_run
    cut, again = student.cut, copy.deepcopy(student)
    unbroken = train(tmp_path / "unbroken", student)
    resumed = train(tmp_path / "resumed", again, resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-2"))
    assert_same_state(state_of(resumed.model), state_of(unbroken.model))
    assert_same_state(state_of(resumed.connectors), state_of(unbroken.connectors))
    first, second = (tmp_path / run / "checkpoint-4" for run in ("unbroken", "resumed"))
    assert Cut.load(first) == Cut.load(second) == cut


def test_a_saved_student_with_a_record_is_a_plain_model(tmp_path):
    student = make_student(tiny_vit(), layers=[0, 2])
    trainer = make_trainer(tmp_path, student, tiny_vit(), image_rows(4))
    trainer.save_model()
    _, info = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())


def test_a_student_without_a_cut_takes_the_record_of_another_away(tmp_path):
    make_trainer(tmp_path, make_student(tiny_vit(), layers=[0, 2]), tiny_vit(), image_rows(4)).save_model()
    assert (tmp_path / CUT_NAME).exists()
    make_trainer(tmp_path, tiny_vit(num_hidden_layers=2), tiny_vit(), image_rows(4)).save_model()
    assert not (tmp_path / CUT_NAME).exists()


# ---- Adapters ----


@pytest.fixture(params=["peft_config", "wrapped"])
def adapted(request, tmp_path):
    """A LoRA student, wrapped by the trainer or before it, its base, and its teacher."""
    base, teacher = tiny_llama(num_hidden_layers=2), tiny_llama()
    untouched = copy.deepcopy(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "learning_rate": 0.05}
    if request.param == "peft_config":
        trainer = make_trainer(tmp_path, base, teacher, token_rows(8), peft_config=config, **settings)
    else:
        student = transformers.AutoModelForCausalLM.from_config(base.config)
        student.load_state_dict(base.state_dict())
        from peft import get_peft_model

        trainer = make_trainer(tmp_path, get_peft_model(student, config), teacher, token_rows(8), **settings)
    connectors = state_of(trainer.connectors)
    trainer.train()
    return trainer, untouched, connectors


def test_an_adapter_trains_with_its_connectors_and_loads_by_plain_peft(adapted, tmp_path):
    trainer, untouched, connectors = adapted
    assert isinstance(trainer, BlockwiseDistillTrainer)
    batch = {n: t for n, t in batch_of(token_rows(3, seed=5)).items() if n != "labels"}
    with torch.no_grad():
        expected, before = trainer.model.eval()(**batch).logits, untouched(**batch).logits
        for folder in (tmp_path / "checkpoint-2", tmp_path / "direct"):
            if folder.name == "direct":
                trainer.model.save_pretrained(str(folder))
            loaded = PeftModel.from_pretrained(copy.deepcopy(untouched), folder).eval()
            assert torch.equal(loaded(**batch).logits, expected)
            assert torch.allclose(loaded.merge_and_unload()(**batch).logits, expected, atol=1e-5)
            names = load_file(folder / "adapter_model.safetensors")
            assert all("lora_" in name for name in names)
    assert (expected - before).abs().max() > 1e-3
    assert all(not torch.equal(t, connectors[n]) for n, t in state_of(trainer.connectors).items())
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_the_base_of_an_adapter_stays_as_it_was(adapted):
    trainer, untouched, _ = adapted
    merged = trainer.model.unload()
    weights = {n: t for n, t in state_of(merged).items() if not n.startswith(MODULE_NAME)}
    assert_same_state(weights, state_of(untouched))
