"""What is saved goes where transformers' own models go: students and stepping stones, `torch.export` and ONNX."""

import warnings

import pytest
import torch

from hf_blockkd import load_stepping_stone
from hf_blockkd.ladder.stone_model import SteppingStone
from hf_blockkd.routing.logits import main_outputs

from ..helpers.tiny_models import tiny_bert, tiny_llama, tiny_vit
from ..helpers.training import batch_of, image_rows, make_trainer, text_rows, token_rows

FAMILIES = {"vit": (tiny_vit, image_rows), "bert": (tiny_bert, text_rows), "llama": (tiny_llama, token_rows)}
KINDS = ("student", "stone", "plain stone")
NARROW = {"hidden_size": 8}
PLAIN = {"connector": "identity", "train_connectors": False}
CASES = [(family, kind) for family in FAMILIES for kind in KINDS]


def loaded(folder, family, kind):
    """A model as a person has it after training, and the inputs of four examples."""
    build, make_rows = FAMILIES[family]
    is_plain = kind == "plain stone"
    student = build(num_hidden_layers=2, **({} if is_plain else NARROW))
    trainer = make_trainer(folder, student, build(), make_rows(4), max_steps=1, **(PLAIN if is_plain else {}))
    trainer.train()
    if kind == "student":
        trainer.save_model()
        model = type(student).from_pretrained(folder)
    else:
        trainer.save_stepping_stone(1, folder)
        model = load_stepping_stone(folder)
        assert isinstance(model, SteppingStone) != is_plain
    model.config.use_cache = False
    return model.eval(), {name: value for name, value in batch_of(make_rows(4)).items() if name != "labels"}


def free_sizes(inputs):
    """Batches of any size, and texts of any length."""
    places = {name: (0,) if value.ndim == 4 else (0, 1) for name, value in inputs.items()}
    return {name: dict.fromkeys(dims, torch.export.Dim.DYNAMIC) for name, dims in places.items()}


def others(inputs):
    """Three of the examples, and a token less of each text."""
    return {name: value[:3] if value.ndim == 4 else value[:3, :-1] for name, value in inputs.items()}


@torch.no_grad()
def logits(model, inputs):
    return main_outputs(model(**inputs))[0]


@pytest.mark.parametrize(
    ("family", "kind"), [pytest.param(*case, marks=[] if case[0] == "bert" else pytest.mark.slow) for case in CASES]
)
def test_an_exported_program_answers_as_the_model_does(tmp_path, family, kind):
    model, inputs = loaded(tmp_path, family, kind)
    program = torch.export.export(model, (), inputs, dynamic_shapes=free_sizes(inputs), strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(logits(module, others(inputs)), logits(model, others(inputs)), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_onnx_runtime_answers_as_the_model_does(tmp_path, family, kind):
    pytest.importorskip("onnxscript", reason="install onnx, onnxscript and onnxruntime to test the export to ONNX")
    runtime = pytest.importorskip("onnxruntime", reason="install onnxruntime to test the export to ONNX")
    model, inputs = loaded(tmp_path, family, kind)
    file = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (), file, kwargs=inputs, dynamic_shapes=free_sizes(inputs), dynamo=True, verbose=False)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    some = others(inputs)
    assert {one.name for one in session.get_inputs()} == some.keys()
    answers = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in some.items()})[0])
    torch.testing.assert_close(answers, logits(model, some), rtol=1e-4, atol=1e-5)
