"""Every way to train x every kind of model: it trains, goes on to the same bits from a checkpoint, and loads again.

Two processes are tested in `test_trainer_distributed.py`.
"""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from ..helpers.tiny_models import tiny_bert, tiny_llama, tiny_vit
from ..helpers.training import (
    assert_same_state,
    batch_of,
    image_rows,
    make_trainer,
    state_of,
    step_logs,
    text_rows,
    token_rows,
)

MODELS = {
    "vit": (tiny_vit, image_rows, AutoModelForImageClassification, ["q_proj", "v_proj"]),
    "bert": (tiny_bert, text_rows, AutoModelForSequenceClassification, ["query", "value"]),
    "llama": (tiny_llama, token_rows, AutoModelForCausalLM, ["q_proj", "v_proj"]),
}
WAYS = {
    "one-process": {},
    "bf16": {"bf16": True},
    "activation-checkpointing": {"activation_checkpointing": True},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "lora": {"lora": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_it_trains_resumes_to_the_same_bits_and_reloads(tmp_path, model, way):
    build, make_rows, auto_class, targets = MODELS[model]
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, **WAYS[way]}
    adapter = LoraConfig(r=2, target_modules=targets, lora_dropout=0.1) if settings.pop("lora", False) else None
    student, teacher = build(num_hidden_layers=2), build()
    before = state_of(student)

    def trainer(folder):
        torch.manual_seed(0)
        return make_trainer(
            tmp_path / folder,
            copy.deepcopy(student),
            teacher,
            make_rows(14),
            peft_config=copy.deepcopy(adapter),
            **{**settings, "stepping_stones": "sample"},
        )

    unbroken = trainer("run")
    unbroken.train()
    weights, logs = state_of(unbroken.model), step_logs(unbroken)
    moved = [name for name, tensor in weights.items() if name in before and not torch.equal(tensor, before[name])]
    assert adapter or moved

    (tmp_path / "run" / "checkpoint-5" / "model.safetensors").unlink(missing_ok=True)
    (tmp_path / "run" / "checkpoint-5" / "connectors.safetensors").unlink()
    resumed = trainer("run")
    resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 4
    assert_same_state(state_of(resumed.model), weights)
    assert step_logs(resumed) == logs

    resumed.model.eval()
    batch = {name: tensor for name, tensor in batch_of(make_rows(3, seed=5)).items() if name != "labels"}
    if adapter:
        loaded = PeftModel.from_pretrained(copy.deepcopy(student), tmp_path / "run" / "checkpoint-5")
    else:
        loaded, info = auto_class.from_pretrained(tmp_path / "run" / "checkpoint-5", output_loading_info=True)
        assert {key: value for key, value in info.items() if value} == {}
    with torch.no_grad():
        expected = resumed.model(**batch).logits  # in the precision of its training
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "bf16"):
            assert torch.equal(loaded.eval()(**batch).logits.float(), expected.float())
