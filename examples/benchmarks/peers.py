"""Plain knowledge distillation as others do it, one trainer each, for the step benchmark.

All of them come with a teacher of their own and are stepped through `Trainer.training_step`. Peers that are not
installed are left out; `make bench` installs them all.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments

TEMPERATURE = 2.0


class DocsRecipe(Trainer):
    """The recipe of the transformers docs: cross-entropy and KL, half each, over all logits at once."""

    def __init__(self, teacher: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher = self.accelerator.prepare_model(teacher.requires_grad_(False).eval(), evaluation_mode=True)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            target = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"})
        distillation = self.divergence(*(self.rows(one.logits) for one in (outputs, target)), inputs["labels"])
        loss = 0.5 * outputs.loss + 0.5 * distillation
        return (loss, outputs) if return_outputs else loss

    def rows(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, :-1].flatten(0, 1) if logits.ndim == 3 else logits

    def divergence(self, logits: torch.Tensor, target: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        student, teacher = F.log_softmax(logits / TEMPERATURE, dim=-1), F.softmax(target / TEMPERATURE, dim=-1)
        return F.kl_div(student, teacher, reduction="batchmean") * TEMPERATURE**2


class VectorRecipe(DocsRecipe):
    """The same for models without a head: the squared error of vectors, means over positions, and no task loss."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        ours = mean_vectors(model, inputs)
        loss = F.mse_loss(ours, self.targets(inputs, ours))
        return (loss, ours) if return_outputs else loss

    def targets(self, inputs: dict[str, Any], ours: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return mean_vectors(self.teacher, inputs)


class GivenVectors(VectorRecipe):
    """Without a teacher: its vectors are there beforehand, which ones does not matter for a step."""

    def __init__(self, **kwargs: Any) -> None:
        Trainer.__init__(self, **kwargs)

    def targets(self, inputs: dict[str, Any], ours: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(ours)


def mean_vectors(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].to(states)
    return (states * mask).sum(1) / mask.sum(1)


class TorchDistill(DocsRecipe):
    """The same with torchdistill's `KDLoss`; its `DistillationBox` imports torchvision, which this leaves out."""

    def __init__(self, **kwargs: Any) -> None:
        from torchdistill.losses.mid_level import KDLoss

        super().__init__(**kwargs)
        self.kd_loss = KDLoss("logits", "output", "logits", "output", temperature=TEMPERATURE, alpha=0.0)

    def divergence(self, logits: torch.Tensor, target: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.kd_loss({"logits": {"output": logits}}, {"logits": {"output": target}}, labels)


def modelopt_trainer(student: PreTrainedModel, teacher: PreTrainedModel, args: TrainingArguments) -> Trainer:
    """NVIDIA ModelOpt's `KDTrainer`: the KL alone, without a task loss."""
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    distill_args = {"distill": True, "teacher_model": teacher.eval(), "temperature": TEMPERATURE}
    return KDTrainer(model=student, args=args, distill_args=distill_args)


def gkd_trainer(student: PreTrainedModel, teacher: PreTrainedModel, args: TrainingArguments) -> Trainer:
    """TRL's `GKDTrainer` on given text with the forward KL alone, without a task loss."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    config = GKDConfig(
        args.output_dir,
        lmbda=0.0,
        beta=0.0,
        temperature=TEMPERATURE,
        report_to="none",
        use_cpu=args.use_cpu,
        bf16=args.bf16,
        activation_checkpointing=False,
    )
    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list([{"messages": chat}] * 8),
        processing_class=two_words(),
    )


def trl_trainer(student: PreTrainedModel, teacher: PreTrainedModel, args: TrainingArguments) -> Trainer:
    """TRL's `DistillationTrainer` with the forward KL, on given texts instead of the student's own."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class OnGivenTexts(DistillationTrainer):
        current_gradient_accumulation_steps = 1  # which `train` sets, and a single step does not

        def _prepare_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            return {
                "prompt_ids": ids[:, :1],
                "prompt_mask": mask[:, :1],
                "completion_ids": ids[:, 1:],
                "completion_mask": mask[:, 1:],
                "num_items_in_batch": mask[:, 1:].sum(),
            }

    config = DistillationConfig(
        args.output_dir,
        beta=0.0,
        temperature=TEMPERATURE,
        report_to="none",
        use_cpu=args.use_cpu,
        bf16=args.bf16,
        gradient_checkpointing=False,
    )
    return OnGivenTexts(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 8),
        processing_class=two_words(),
    )


def sentence_trainer(student: PreTrainedModel, teacher: PreTrainedModel, args: TrainingArguments) -> Trainer:
    """`MSELoss` of sentence-transformers, whose targets a data set holds: the teacher's vectors are made beforehand."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MSELoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    class OnTokens(SentenceTransformerTrainer):
        vectors: torch.Tensor | None = None

        def _prepare_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
            tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
            if self.vectors is None:
                with torch.no_grad():
                    self.vectors = mean_vectors(teacher.eval(), tokens)
            return {**{f"sentence_{name}": value for name, value in tokens.items()}, "label": self.vectors}

    folder = f"{args.output_dir}/student"
    for part in (student, two_words()):
        part.save_pretrained(folder)
    body = Transformer(folder)
    model = SentenceTransformer(modules=[body, Pooling(student.config.hidden_size)], device=student.device.type)
    config = SentenceTransformerTrainingArguments(
        args.output_dir, report_to="none", use_cpu=args.use_cpu, bf16=args.bf16, disable_tqdm=True
    )
    rows = Dataset.from_dict({"sentence": ["a"] * 8, "label": [[0.0]] * 8})
    return OnTokens(model=model, args=config, train_dataset=rows, loss=MSELoss(model))


def two_words() -> Any:
    """A tokenizer of chats, which TRL's trainers ask for and a step on ready tokens never looks at."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def peer_trainers(outputs: str) -> dict[str, Any]:
    """Name -> function of student, teacher and arguments that makes a trainer, for the peers that are installed."""
    recipe = VectorRecipe if outputs == "vectors" else DocsRecipe
    peers: dict[str, Any] = {
        "docs recipe": lambda student, teacher, args: recipe(teacher=teacher, model=student, args=args)
    }
    if outputs == "vectors":
        return peers | (
            {"sentence-transformers MSELoss": sentence_trainer} if find_spec("sentence_transformers") else {}
        )
    if find_spec("torchdistill"):
        peers["torchdistill KDLoss"] = lambda student, teacher, args: TorchDistill(
            teacher=teacher, model=student, args=args
        )
    # Both shift the logits by one token whatever the model, so they are for causal language models only.
    if outputs == "tokens" and find_spec("modelopt"):
        peers["ModelOpt KDTrainer"] = modelopt_trainer
    if outputs == "tokens" and find_spec("trl"):
        peers |= {"TRL GKDTrainer": gkd_trainer, "TRL DistillationTrainer": trl_trainer}
    return peers
