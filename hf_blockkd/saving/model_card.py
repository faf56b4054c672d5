"""The page that tells what a saved student is, where it comes from and what it reached: `write_card`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, TrainingArguments
from transformers.modelcard import TASK_MAPPING, TASK_TAG_TO_NAME_MAPPING, extract_hyperparameters_from_trainer
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import logging

from ..config import BlockwiseDistillConfig
from ..config_values import OBJECTIVE_WEIGHTS
from ..connectors.attached import detached
from ..losses.learners import STUDENT
from ..models.adapters import is_peft
from ..models.classes import is_headless, transformers_class
from ..models.cut import Cut
from ..models.pooling import MODULES
from ..version import __version__
from .last_evaluation import Table, last_evaluation

CARD_NAME = "README.md"
PAPER = "https://arxiv.org/abs/2411.01547"
TAGS = ("knowledge-distillation", "hf-blockkd", "generated_from_trainer")
PICTURES = ("path.png", "losses.png", "blocks.png")
"""What `hf-blockkd report` draws beside a student."""
MARK = "<!-- Written by hf-blockkd at every save, until something in it is changed: {} -->"
SAMPLES = {
    "audio-classification": '"sound.wav"',
    "automatic-speech-recognition": '"speech.wav"',
    "fill-mask": 'f"Paris is the {pipe.tokenizer.mask_token} of France."',
    "image-classification": '"image.png"',
    "image-segmentation": '"image.png"',
    "object-detection": '"image.png"',
    "text-classification": '"A text to classify."',
    "text-generation": '"Once upon a time"',
    "token-classification": '"A text with names such as Paris."',
}
"""Task -> what the pipeline of its name is called with."""
CITATION = """\
@article{yu2024decoupling,
    title   = {Decoupling Dark Knowledge via Block-wise Logit Distillation for Feature-level Alignment},
    author  = {Yu, Chengting and Zhang, Fengzhao and Chen, Ruizhe and Wang, Aili and Liu, Zuozhu and Tan, Shurun and
               Li, Er-Ping},
    journal = {IEEE Transactions on Artificial Intelligence},
    year    = {2024},
    note    = {arXiv:2411.01547},
}"""

logger = logging.get_logger(__name__)


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Leave a file as it was, or gone if it was not there: an adapter writes a card of its own beside its weights."""
    before = path.read_bytes() if path.is_file() else None
    yield
    if before is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(before)


def write_card(
    trainer: Any,
    folder: str | Path,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> None:
    """Write the model card of a student, unless a person wrote one, or changed what we wrote.

    It holds what the trainer knows: both models, the method with its settings, what was cut, the data, the metrics of
    the last evaluation of these weights (in the `model-index` of the hub, too), a picture of `hf-blockkd report` if
    one lies there, and how the student is used without our code. What was given for an earlier card of the same folder
    stays. All keyword arguments are those of [`~transformers.Trainer.create_model_card`].

    Args:
        trainer: The [`BlockwiseDistillTrainer`].
        folder: Where the student lies.
        language: Of the data, for the metadata.
        license: Of the student; default: none, since that of the teacher may not be yours to give on.
        tags: More tags.
        model_name: Default: the name of the repository on the hub, or of `output_dir`.
        finetuned_from: What the student began as, on the hub; default: the name it, or else its teacher, was loaded by.
        tasks: As the hub has them; default: by the class of the student.
        dataset_tags: Of the data on the hub; default: what `datasets` loaded from there.
        dataset: A name of the data for people.
        dataset_args: Its configuration.

    Example:
        ```python
        >>> from hf_blockkd.saving.model_card import is_ours, sealed
        >>> card = sealed("# A student")
        >>> is_ours(card), is_ours(card.replace("student", "student of mine"))
        (True, False)

        ```
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    path, args = Path(folder, CARD_NAME), trainer.args
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    if before is not None and not is_ours(before):
        logger.warning_once(f"{path} is kept as it is: it was not written here, or has been changed since.")
        return
    old = {} if before is None else ModelCard(before).data.to_dict()
    student, teacher = trainer.pair.student, trainer.pair.teacher
    name = model_name or Path(args.hub_model_id or args.output_dir).name or "student"
    task = (_listed(tasks) or [_task(student)])[0]
    is_embedder = Path(folder, MODULES).is_file()
    bases = [finetuned_from] if finetuned_from else [_hub_name(student), _hub_name(teacher)]
    data = _Data(trainer, _listed(dataset_tags), _listed(dataset), _listed(dataset_args), _listed(old.get("datasets")))
    step, table = last_evaluation(trainer.state, args, data.evaluated)
    results = [] if trainer.objective.deploys_last_stone else list(_results(table, data, task))
    kinds = ["lora" if one == "LORA" else one.lower() for one in _adapters(trainer.model)]
    embedder = ["sentence-transformers", "sentence-similarity"] * is_embedder
    card_data = ModelCardData(
        base_model=next((one for one in bases if one), None),
        datasets=data.tags or None,
        eval_results=results or None,
        language=language or old.get("language"),
        library_name="peft" if kinds else "sentence-transformers" if is_embedder else "transformers",
        license=license or old.get("license"),
        metrics=sorted({name for metrics in table.values() for name in metrics} - {"loss"}) or None,
        model_name=name,
        pipeline_tag="sentence-similarity" if is_embedder else task,
        tags=[*TAGS, *embedder, *kinds, *_listed(tags), *_listed(old.get("tags"))],
    )
    parts = [
        f"# {name}\n\n{MARK}\n\n{_origin(trainer)}",
        f"## How to use it\n\n```python\n{_usage(student, task, folder, args.hub_model_id or name)}\n```",
        _evaluation(table, step, trainer, Path(folder)),
        _cut(getattr(student, "cut", None)),
        f"## How it was trained\n\n{_training(trainer, data)}",
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    body = "\n\n".join(part for part in parts if part)
    path.write_text(sealed(f"---\n{card_data.to_yaml()}\n---\n\n{body}\n"), encoding="utf-8", newline="\n")


def sealed(card: str) -> str:
    """A card with the mark of what is in it, by which a change is known."""
    card = card if MARK in card else f"{MARK}\n{card}"
    return card.replace(MARK, MARK.format(hashlib.sha256(card.encode()).hexdigest()[:12]), 1)


def is_ours(card: str) -> bool:
    """Whether a card is still as it was written here."""
    before, after = map(re.escape, MARK.split("{}"))
    return sealed(re.sub(before + "[0-9a-f]{12}" + after, MARK, card, count=1)) == card


# ---- What is in it ----


class _Data:
    """What is known of the data: names on the hub, names for people, sizes."""

    def __init__(self, trainer: Any, tags: list[str], names: list[str], configs: list[str], earlier: list[str]) -> None:
        train, evaluated = trainer.train_dataset, trainer.eval_dataset
        self.evaluated = sorted(evaluated, key=len, reverse=True) if isinstance(evaluated, Mapping) else []
        found = [_dataset_on_hub(one) for one in (train, *(evaluated[name] for name in self.evaluated))]
        self.tags = tags or sorted({one for one in found if one}) or earlier
        self.names = names or self.tags
        self.configs = configs
        self.rows = None if self.evaluated else evaluated
        sizes = {"train on": train, "evaluate on": self.rows}
        self.sizes = [f"{len(rows):,} rows to {use}" for use, rows in sizes.items() if hasattr(rows, "__len__")]

    def of(self, name: str) -> dict[str, Any]:
        """What a result says of its data."""
        tag = self.tags[0] if self.tags else None
        split = name or getattr(self.rows, "split", None)  # which tells results apart in a `model-index`
        own = {"dataset_config": self.configs[0]} if self.configs else {}
        return own | {
            "dataset_type": tag or "unknown",
            "dataset_name": name or (self.names[0] if self.names else "Unknown"),
            "dataset_split": None if split is None else str(split),
        }


def _results(table: Table, data: _Data, task: str) -> Iterator[EvalResult]:
    """Those of the student, and the teacher's under names that no leaderboard takes for the student's."""
    for name, metrics in table.items():
        for who, before, of in ((STUDENT, "", ""), ("teacher", "teacher_", " of the teacher")):
            for metric, values in metrics.items():
                if who in values:
                    yield EvalResult(
                        task_type=task,
                        task_name=TASK_TAG_TO_NAME_MAPPING.get(task),
                        metric_type=before + metric,
                        metric_name=metric.replace("_", " ").capitalize() + of,
                        metric_value=round(values[who], 6),
                        **data.of(name),
                    )


def _origin(trainer: Any) -> str:
    pair, student = trainer.pair, trainer.pair.student
    with detached(student):
        own = f"`{transformers_class(student).__name__}` {_size(student, pair.block_map.student[-1])}"
    kind = f"An adapter of {_called(student)}, a {own}," if is_peft(trainer.model) else f"A {own},"
    if trainer.args.captured_columns is not None and not trainer.pair.trained_stones:
        teacher = "what a server wrote of its teacher"
    else:
        teacher = f"{_called(pair.teacher)} {_size(pair.teacher, pair.block_map.teacher[-1])}"
    return (
        f"{kind} distilled from {teacher}.\nThe method is `objective={trainer.args.objective!r}` of hf-blockkd, which "
        f"does block-wise logit distillation ([Yu et al., 2024]({PAPER})) and its relatives."
    )


def _usage(student: PreTrainedModel, task: str | None, folder: str | Path, name: str) -> str:
    if Path(folder, MODULES).is_file():
        return (
            "from sentence_transformers import SentenceTransformer\n\n"
            f'model = SentenceTransformer("{name}")\nvectors = model.encode(["A text.", "Another one."])'
        )
    prepared = any(Path(folder).glob("*processor_config.json")) or Path(folder, "tokenizer_config.json").is_file()
    is_of_colours = getattr(student.config, "num_channels", 3) == 3  # as which pipelines open every image
    if task in SAMPLES and task in PIPELINE_REGISTRY.get_supported_tasks() and prepared and is_of_colours:
        return (
            f'from transformers import pipeline\n\npipe = pipeline("{task}", model="{name}")\n'
            f"print(pipe({SAMPLES[task]}))"
        )
    own = transformers_class(student).__name__
    own = own if hasattr(transformers, own) else "AutoModel"
    return f'from transformers import {own}\n\nmodel = {own}.from_pretrained("{name}")'


def _evaluation(table: Table, step: int | None, trainer: Any, folder: Path) -> str:
    lines, state = [], trainer.state
    if table:
        lines = [
            f"After {step} of {max(state.max_steps, step)} steps:" if state.max_steps else "Before any training:",
            "",
        ]
    for name, metrics in table.items():
        whose = sorted({one for values in metrics.values() for one in values}, key=_rank)
        own = "student's blocks under the teacher's head" if trainer.objective.deploys_last_stone else "student"
        titles = [own if one == STUDENT else one.replace("_", " ") for one in whose]
        lines.append("| " + " | ".join([name or "metric", *titles]) + " |")
        lines.append("| --- |" + " ---: |" * len(whose))
        for metric, values in metrics.items():
            numbers = [f"{values[one]:.4g}" if one in values else "" for one in whose]
            lines.append("| " + " | ".join([metric.replace("_", " "), *numbers]) + " |")
        lines.append("")
    lines += [f"![{name}]({name})" for name in PICTURES if (folder / name).is_file()][:1]
    return "\n".join(["## What it reached", "", *lines]).rstrip() if lines else ""


def _cut(cut: Any) -> str:
    if not isinstance(cut, Cut):
        return ""
    lines = [f"It began as layers {', '.join(map(str, cut.layers))} (counted from 0) of the teacher's {cut.depth}."]
    if cut.axes:
        lines += ["Narrower than in the teacher are:", "", "| tensor of the teacher | dimension | from | to |"]
        lines.append("| --- | ---: | ---: | ---: |")
        names = [re.sub(r"\.\d+\.", ".*.", axis["tensor"]) for axis in cut.axes]
        rows = [
            f"| `{name}` | {axis['dim']} | {axis['size']} | {len(axis['kept'])} |"
            for name, axis in zip(names, cut.axes, strict=True)
        ]
        lines += dict.fromkeys(rows)  # one for all layers that are alike
        lines += ["", "`cut.json` says which entries were kept."]
    return "\n".join(["## What was cut out of the teacher", "", *lines])


def _training(trainer: Any, data: _Data) -> str:
    lines = []
    if data.names or data.sizes:
        named = ", ".join(data.names)
        lines = ["Data: " + ", ".join([*([named] if named else []), *data.sizes]) + ".", ""]
    lines += ["Both models were cut into blocks like this:", "", "```", str(trainer.pair.block_map), "```", ""]
    given = {**_settings(trainer), **extract_hyperparameters_from_trainer(trainer)}
    lines += [f"- {name}: {value}" for name, value in given.items()]
    versions = {"hf-blockkd": __version__} | {
        name: importlib.metadata.version(name) for name in ("transformers", "torch", "datasets", "tokenizers")
    }
    if is_peft(trainer.model):
        versions["peft"] = importlib.metadata.version("peft")
    lines += ["", "### Framework versions", "", *(f"- {name} {version}" for name, version in versions.items())]
    return "\n".join(lines)


def _settings(trainer: Any) -> dict[str, Any]:
    """Fields of the configuration that are ours: those that describe the method, and those that somebody set."""
    args, stock = trainer.args, {one.name for one in fields(TrainingArguments)}
    weights = {one for name in args.objective.split("+") for one in OBJECTIVE_WEIGHTS[name]}
    shown = {"objective", "stepping_stones", "connector", "temperature", "divergence", *weights}
    # A folder of this machine, what the block map shows, and what is no part of the method.
    hidden = {"teacher_cache", "num_blocks", "student_boundaries", "teacher_boundaries", "eval_stepping_stones"}
    settings: dict[str, Any] = {}
    for one in fields(BlockwiseDistillConfig):
        value = getattr(args, one.name)
        default = None if one.default is MISSING else one.default
        if one.name not in stock | hidden and (one.name in shown or value != default):
            settings[one.name] = value
    settings |= trainer.objective.resolved(trainer.pair)
    # What was left to the run, and is not resolved, has no part in it.
    settings = {name: value for name, value in settings.items() if value is not None}
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in settings.items()}


# ---- Names ----


def _listed(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _rank(who: str) -> tuple[int, int]:
    """The student, the stones in their order, the teacher."""
    place = {STUDENT: 0, "teacher": 2}.get(who, 1)
    return place, int(who.rsplit("_", 1)[-1]) if place == 1 else 0


def _task(student: PreTrainedModel) -> str:
    """The hub's name of what a model does."""
    if is_headless(student):
        return "feature-extraction" if student.main_input_name == "input_ids" else "image-feature-extraction"
    own = transformers_class(student).__name__
    listed = {task: [one for name in names.values() for one in _listed(name)] for task, names in TASK_MAPPING.items()}
    return next((task for task, classes in listed.items() if own in classes), "other")


def _called(model: PreTrainedModel) -> str:
    """A model's name: a link for one on the hub, and the last part of a path, which is nobody else's business."""
    name, hub = model.config.name_or_path, _hub_name(model)
    if hub:
        return f"[{hub}](https://huggingface.co/{hub})"
    return f"`{Path(name).name}`" if name and Path(name).name else f"a `{transformers_class(model).__name__}`"


def _hub_name(model: PreTrainedModel) -> str | None:
    """The name that a model has on the hub, if it was loaded by one."""
    name = model.config.name_or_path
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _dataset_on_hub(rows: Any) -> str | None:
    sources = getattr(getattr(rows, "info", None), "download_checksums", None) or {}
    found = (re.match(r"hf://datasets/([^@]+)@", str(source)) for source in sources)
    return next((one[1] for one in found if one), None)


def _size(model: PreTrainedModel, depth: int) -> str:
    # ZeRO-3 leaves an empty tensor on each rank, which knows its true size.
    count = sum(getattr(one, "ds_numel", one.numel()) for one in model.parameters())
    return f"with {depth} layer{'s' * (depth != 1)} and {count:,} parameters"


def _adapters(model: Any) -> list[str]:
    return [str(one.peft_type.value) for one in model.peft_config.values()] if is_peft(model) else []
