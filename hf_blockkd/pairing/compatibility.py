"""What must hold of a student and a teacher before anything is trained. Every check raises a `ValueError`."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from ..models.classes import is_headless, transformers_class
from .tasks import Task

logger = logging.get_logger(__name__)

SUPPORTED = {
    "AUDIO_CLASSIFICATION",
    "CAUSAL_IMAGE_MODELING",
    "CAUSAL_LM",
    "CTC",
    "DOCUMENT_QUESTION_ANSWERING",
    "IMAGE_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT",
    "MASKED_LM",
    "MULTIMODAL_LM",
    "MULTIPLE_CHOICE",
    "NEXT_SENTENCE_PREDICTION",
    "OBJECT_DETECTION",
    "PRETRAINING",
    "QUESTION_ANSWERING",
    "SEMANTIC_SEGMENTATION",
    "SEQUENCE_CLASSIFICATION",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "TOKEN_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
}
"""Auto-model mappings whose heads give rows of logits that another model's can be compared with, one by one."""
HEADLESS = {"BACKBONE", "IMAGE", "TEXT_ENCODING"}
"""Mappings that list models without a head."""


def check_models(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Student and teacher are two models with heads for one task and the same classes in order, or without heads."""
    if student is teacher:
        raise ValueError(
            "`model` and `teacher_model` are the same object; pass a copy as the teacher, or None with an adapter "
            "(`peft_config`), whose base is the teacher then."
        )
    teacher_parameters = {id(parameter) for parameter in teacher.parameters()}
    if any(p.requires_grad and id(p) in teacher_parameters for p in student.parameters()):
        raise ValueError("`model` and `teacher_model` share parameters, which cannot be frozen and trained at once.")
    for model in (student, teacher):
        _check_task(model)
    if is_headless(student) and not is_headless(teacher):
        raise ValueError(
            f"`model` is a {type(student).__name__} without a head, but the teacher a {type(teacher).__name__} with "
            "one; give the student a head like the teacher's, or pass `teacher_model.base_model` to compare embeddings."
        )
    student_tasks, teacher_tasks = auto_tasks(student), auto_tasks(teacher)
    if not teacher_tasks and student_tasks:
        raise ValueError(
            f"`teacher_model` is a {type(teacher).__name__}, which has no head for {_words(student_tasks)} like the "
            f"student {type(student).__name__}; load the teacher with the student's AutoModelFor... class."
        )
    if student_tasks and not student_tasks & teacher_tasks:
        raise ValueError(
            f"The student {type(student).__name__} is made for {_words(student_tasks)}, but the teacher "
            f"{type(teacher).__name__} for {_words(teacher_tasks)}; both need a head for the same task."
        )
    if _has_classes(student_tasks & teacher_tasks):
        _check_classes(student, teacher)
    if "CTC" in student_tasks & teacher_tasks:
        _check_transcripts(student, teacher)


def auto_tasks(model: PreTrainedModel) -> set[str]:
    """Names of the auto-model mappings, such as `"IMAGE_CLASSIFICATION"`, that list the model's class.

    A model without a head has none, although some mappings (image features, text encoding) list it. A class from
    outside transformers has those of the classes that end like it, e.g. in `ForImageClassification`.
    """
    return set() if is_headless(model) else _listed_tasks(model)


def _listed_tasks(model: PreTrainedModel) -> set[str]:
    """`auto_tasks`, for models without a head, too."""
    own = transformers_class(model)
    name, is_foreign = own.__name__, not own.__module__.startswith("transformers.")
    ending = name[name.rfind("For") :] if is_foreign and "For" in name else None
    tasks: set[str] = set()
    for mapping, classes in vars(modeling_auto).items():
        if not (mapping.startswith("MODEL_FOR_") and mapping.endswith("_MAPPING_NAMES")):
            continue
        listed = {one for entry in classes.values() for one in ((entry,) if isinstance(entry, str) else entry)}
        if name in listed or (ending is not None and any(one.endswith(ending) for one in listed)):
            tasks.add(mapping.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES"))
    return tasks


def _check_task(model: PreTrainedModel) -> None:
    """The model is made for a task whose labels have a row of logits each, as far as transformers knows its class."""
    tasks = _listed_tasks(model) - HEADLESS
    chooses_queries = "OBJECT_DETECTION" in tasks and Task.of(model).form is None
    if chooses_queries or (tasks and not tasks & SUPPORTED):
        reason = "whose queries depend on the image" if chooses_queries else "whose outputs are no rows of logits"
        raise ValueError(
            f"{type(model).__name__} is made for {_words(tasks)}, {reason}, so that one model's cannot be compared "
            "with another's; distil its encoder instead, as an embedding model (AutoModel) or under a head for "
            "classification or for a language model (AutoModelForImageClassification and the like)."
        )


def _has_classes(tasks: set[str]) -> bool:
    return any(task.endswith(("CLASSIFICATION", "SEGMENTATION", "DETECTION")) for task in tasks)


def _check_transcripts(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    for name in ("vocab_size", "pad_token_id"):
        ours, theirs = (getattr(model.config, name) for model in (student, teacher))
        if ours != theirs:
            raise ValueError(
                f"`{name}` is {ours} for the student and {theirs} for the teacher, but both must write the same "
                "tokens, with the same blank (`pad_token_id`); give the student's config the teacher's."
            )
    for model in (student, teacher):
        if Task.of(model).sums:
            logger.warning_once(
                f"`ctc_loss_reduction` is 'sum' in the config of {type(model).__name__}: its task loss grows with the "
                "length of a text, next to a divergence that is a mean over frames; 'mean' makes them alike."
            )


def _words(tasks: set[str]) -> str:
    return " or ".join(sorted(task.lower().replace("_", " ") for task in tasks))


def _check_classes(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    student_config, teacher_config = student.config, teacher.config
    if student_config.num_labels != teacher_config.num_labels:
        raise ValueError(
            f"`num_labels` is {student_config.num_labels} for the student and {teacher_config.num_labels} for the "
            "teacher; give the student's config the teacher's `id2label` and `label2id`."
        )
    problems = {student_config.problem_type, teacher_config.problem_type} - {None}
    if len(problems) > 1:
        raise ValueError(
            f"`problem_type` is {student_config.problem_type!r} for the student and {teacher_config.problem_type!r} "
            "for the teacher; set both alike."
        )
    if student_config.id2label is None or teacher_config.id2label is None:
        return  # PvtConfig names no classes
    for index, teacher_label in sorted(teacher_config.id2label.items()):
        student_label = student_config.id2label.get(index)
        if student_label != teacher_label:
            raise ValueError(
                f"`id2label[{index}]` is {student_label!r} for the student and {teacher_label!r} for the teacher; give "
                "the student's config the teacher's `id2label` and `label2id`."
            )
