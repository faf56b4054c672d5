"""What an example trains, on which data: the teacher, the student and how both are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arguments import ModelArguments, check_fields, read_fields
from datasets import Dataset
from results import Metric
from transformers import AutoConfig, PreTrainedModel

from hf_blockkd import make_student
from hf_blockkd.commands.cut import layers_of
from hf_blockkd.routing.layers import find_layer_stack
from hf_blockkd.students.config_changes import DEPTH_FIELDS

AS_TRAINED = "as_trained"
"""Folder, in that of a model, of the same model before it was finished."""
IMAGES, TOKENS = ("num_channels", "image_size"), ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
INPUTS_AND_CLASSES = ("id2label", "label2id", *IMAGES, *TOKENS)
"""Fields of configs in which a student of another family is like its teacher, where this has them."""


def _same(rows: Any) -> Any:
    return rows


@dataclass
class Task:
    """What an example trains, on which data, and how it is judged.

    Attributes:
        teacher: Loaded or new.
        auto_class: The `AutoModelFor...` class of both models.
        train_set: Rows to train on.
        eval_set: Rows to evaluate on.
        metric: What is compared.
        trainer_arguments: Collator, metrics and processing class, for the trainers.
        as_train: Makes a data set to train on of rows, e.g. with augmentation.
        as_eval: Makes one to evaluate on.
        test_set: Rows whose classes are predicted by every student.
        transfer: Makes of labelled rows those that students train on.
        finish: Makes of the folder of a trained model what is to stay of it.
        teacher_metrics: What the teacher has, where that needs no evaluation: it is the measure itself.
    """

    teacher: PreTrainedModel
    auto_class: type
    train_set: Dataset
    eval_set: Dataset
    metric: Metric
    trainer_arguments: dict[str, Any]
    as_train: Callable[[Dataset], Any] = _same
    as_eval: Callable[[Dataset], Any] = _same
    test_set: Dataset | None = None
    transfer: Callable[[Dataset], Dataset] = _same
    finish: Callable[[Path], None] | None = None
    teacher_metrics: dict[str, float] | None = None

    def load(self, folder: Path) -> PreTrainedModel:
        """A model that was trained, as it was when it was saved."""
        place = folder / AS_TRAINED
        return self.auto_class.from_pretrained(place if place.is_dir() else folder, trust_remote_code=False)

    def arguments(self, train_set: Dataset | None = None, eval_set: Dataset | None = None) -> dict[str, Any]:
        """Arguments about data for a trainer; by default, those of all rows."""
        return {
            "train_dataset": self.as_train(self.train_set if train_set is None else train_set),
            "eval_dataset": self.as_eval(self.eval_set if eval_set is None else eval_set),
            **self.trainer_arguments,
        }


def load_teacher(script: ModelArguments, auto_class: type, **fields: Any) -> PreTrainedModel:
    """The teacher by its name, whole, unless it is trained first.

    Args:
        script: Names it.
        auto_class: The `AutoModelFor...` class.
        **fields: Of its config.

    Raises:
        ValueError: If some of its weights would be new and stay untrained.
    """
    teacher, loading = auto_class.from_pretrained(
        script.teacher,
        ignore_mismatched_sizes=script.train_teacher,
        trust_remote_code=False,
        output_loading_info=True,
        **fields,
    )
    new = sorted(loading["missing_keys"])
    if new and not script.train_teacher:
        raise ValueError(
            f"The teacher {script.teacher!r} has no weights for {new[0]!r}, which would stay as they are drawn: "
            "fine-tune it first with `--train_teacher true`, or name a fine-tuned one."
        )
    return teacher


def new_student(
    script: ModelArguments, teacher: PreTrainedModel, auto_class: type, data: dict[str, Any]
) -> PreTrainedModel:
    """The student: loaded, cut out of the teacher, or new, with the teacher's classes."""
    if script.student is not None:
        config = AutoConfig.from_pretrained(script.student, trust_remote_code=False)
        overrides = read_fields("student_config", script.student_config, config)
        classes = {"id2label": teacher.config.id2label, "label2id": teacher.config.label2id}
        return auto_class.from_pretrained(
            script.student, ignore_mismatched_sizes=True, trust_remote_code=False, **classes, **overrides
        )
    overrides = read_fields("student_config", script.student_config)
    fields = teacher.config.to_dict()
    family = overrides.pop("model_type", fields["model_type"])
    if family != fields["model_type"]:
        if not script.fresh:
            raise ValueError(
                f"`student_config` names the model type {family!r}, but a student that is cut out of its teacher is a "
                f"{fields['model_type']!r}, too; set `fresh`."
            )
        fields = {"model_type": family, **{name: fields[name] for name in INPUTS_AND_CLASSES if name in fields}}
    if script.fresh:  # of a cut, `make_student` knows which part of the config a field belongs to
        check_fields("student_config", overrides, AutoConfig.for_model(**fields))
    depth_field = next((name for name in DEPTH_FIELDS if name in overrides), None)
    if script.student_layers is not None and depth_field is not None:
        raise ValueError(
            f"`student_layers` is {script.student_layers} and `{depth_field}` in `student_config` "
            f"{overrides[depth_field]}; give one of them."
        )
    if script.fresh:
        if script.student_layers is not None:
            depth = len(find_layer_stack(teacher))
            field = next(name for name in DEPTH_FIELDS if getattr(teacher.config, name, None) == depth)
            overrides[field] = script.student_layers
        config = AutoConfig.for_model(**{**fields, **overrides})
        return auto_class.from_config(config, dtype=teacher.dtype, trust_remote_code=False)
    return make_student(
        teacher,
        num_layers=overrides.pop(depth_field, script.student_layers),
        layers=layers_of(script.layers),
        channels=script.channels,
        fit=script.fit,
        data=data["train_dataset"],
        data_collator=data.get("data_collator"),
        **overrides,
    )
