"""`torch_compile=True`: the same numbers, and nothing that is compiled anew from step to step."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from ..helpers.tiny_models import tiny_bert, tiny_llama, tiny_vit
from ..helpers.training import (
    PLAIN_SGD,
    Gradients,
    batch_of,
    image_rows,
    make_trainer,
    max_difference,
    state_of,
    text_rows,
    token_rows,
)

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = {
    "vit": (tiny_vit, {}, image_rows),
    "bert": (tiny_bert, NO_DROPOUT, text_rows),
    "llama": (tiny_llama, {}, token_rows),
}


class Graphs(Gradients):
    """Keeps, at the end of every step, how many graphs dynamo has made and how often one broke."""

    def __init__(self):
        super().__init__()
        self.made, self.breaks = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.made.append(counters["stats"]["unique_graphs"])
        self.breaks.append(sum(counters["graph_break"].values()))


def train(folder, student, teacher, rows, **settings):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(1)
    watch = Graphs()
    trainer = make_trainer(folder, student, teacher, rows, callbacks=[watch], **{**PLAIN_SGD, **settings})
    # At its limit, dynamo would go on without compiling.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        trainer.train()
    return trainer, watch


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("vit", {}),
        pytest.param("bert", {}, marks=SLOW),
        pytest.param("llama", {}, marks=SLOW),
        pytest.param("vit", {"bf16": True}, marks=SLOW),
        pytest.param("bert", {"activation_checkpointing": True}, marks=SLOW),
        pytest.param("llama", {"activation_checkpointing": True, "loss_chunk_size": 3}, marks=SLOW),
        pytest.param("bert", {"stepping_stones": "all", "gradient_accumulation_steps": 2}, marks=SLOW),
    ],
    ids=str,
)
def test_compiled_layers_train_as_plain_ones_and_are_compiled_once(tmp_path, family, settings):
    """With stones that are drawn anew at every step, through models that are deeper than dynamo's limit of 8 graphs."""
    build, config, rows = FAMILIES[family]
    student, teacher = build(num_hidden_layers=4, **config), build(num_hidden_layers=12, **config)
    settings = {"max_steps": 8, "stepping_stones": "sample", "num_blocks": 4, **settings}
    plain, _ = train(tmp_path, copy.deepcopy(student), copy.deepcopy(teacher), rows(8), **settings)
    compiled, graphs = train(tmp_path, student, teacher, rows(8), **COMPILED, **settings)
    assert graphs.breaks[-1] == 0
    # The student's layers, and the teacher's with and without gradients; a draw may come to the latter later.
    assert 3 <= graphs.made[-1] <= 4
    assert set(graphs.made[3:]) == {graphs.made[-1]}, graphs.made
    assert max_difference(state_of(compiled.model), state_of(plain.model)) < (1e-2 if settings.get("bf16") else 1e-5)


@pytest.mark.slow
def test_batches_of_other_sizes_stop_compiling_anew_soon(tmp_path):
    """Examples that are shared out among the stones: dynamo makes the size a variable when it has seen a second one."""
    student, teacher = tiny_vit(num_hidden_layers=3), tiny_vit(num_hidden_layers=6)
    settings = {"max_steps": 24, "stepping_stones": "share", "num_blocks": 3, "per_device_train_batch_size": 8}
    _, graphs = train(tmp_path, student, teacher, image_rows(16), **COMPILED, **settings)
    assert graphs.made[-1] == graphs.made[11], graphs.made


def test_a_student_that_was_compiled_is_a_plain_one_afterwards(tmp_path):
    student, teacher = tiny_vit(num_hidden_layers=2), tiny_vit()
    names = set(student.state_dict())
    trainer, _ = train(tmp_path, student, teacher, image_rows(4), eval_dataset=image_rows(4), max_steps=1, **COMPILED)
    assert not any("forward" in vars(module) for model in (student, teacher) for module in model.modules())
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    loaded, info = type(student).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert set(loaded.state_dict()) == names
    with torch.no_grad():
        assert loaded(**batch_of(image_rows(4))).loss.item() == pytest.approx(loss, abs=1e-5)


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def one_layer(model):
    model.vit.layers[1].compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [whole, in_place, one_layer])
@pytest.mark.parametrize("role", ["model", "teacher_model"])
def test_models_that_are_compiled_already_are_refused(tmp_path, compiled, role):
    models = {"model": tiny_vit(num_hidden_layers=2), "teacher_model": tiny_vit()}
    models[role] = compiled(models[role])
    with pytest.raises(ValueError, match=f"`{role}` is compiled.*set `torch_compile=True`"):
        make_trainer(tmp_path, *models.values(), image_rows(4))
