"""The arguments of the examples: one recipe from a YAML file beside the script, one of your own, and flags."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, PreTrainedConfig, TrainingArguments

from hf_blockkd import BlockwiseDistillConfig
from hf_blockkd.commands.cut import layers_of
from hf_blockkd.commands.flags import FlagParser
from hf_blockkd.config_values import check_objective
from hf_blockkd.objectives import OBJECTIVES
from hf_blockkd.students.choices import CHANNEL_CHOICES, LAYER_CHOICES
from hf_blockkd.students.config_parts import owners_of

METHODS = {"alone": "student alone", "kd": "student, plain KD", "block_kd": "student, Block-KD"}
"""The methods that are compared by default, and their names; all others go by that of their objective."""
TOGETHER = ({"student", "student_layers", "student_config"}, {"dataset", "dataset_config", "train_file"})
"""Fields that describe one thing: who sets one of them means none that the recipe sets of the others."""


@dataclass
class ModelArguments:
    """The teacher, and the student."""

    config: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with fields and values; it may stand first, without the flag. What it leaves out is "
            "as in the recipe beside the script, whose values are the defaults shown here."
        },
    )
    teacher: str | None = field(default=None, metadata={"help": "Name or path of the teacher."})
    train_teacher: bool = field(
        default=False, metadata={"help": "Train the teacher first: `teacher` on this data, or a new one."}
    )
    teacher_config: str | None = field(default=None, metadata={"help": "JSON: config fields of a new teacher."})
    teacher_epochs: float = field(default=3, metadata={"help": "Epochs of the teacher's training."})
    teacher_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the teacher."})
    student: str | None = field(default=None, metadata={"help": "Name or path of a student to start from."})
    student_layers: int | None = field(default=None, metadata={"help": "Depth of a student of the teacher's width."})
    student_config: str | None = field(
        default=None, metadata={"help": "JSON: fields in which the student's config differs from the teacher's."}
    )
    fresh: bool = field(
        default=False, metadata={"help": "Begin with new weights, instead of cutting the student out of the teacher."}
    )
    layers: str = field(
        default="even",
        metadata={"help": f"Which layers the cut keeps: {', '.join(LAYER_CHOICES)}, or indices such as 0,2,5."},
    )
    channels: str | None = field(
        default=None, metadata={"help": "What its channels are chosen by.", "choices": [*CHANNEL_CHOICES]}
    )
    fit: bool = field(default=True, metadata={"help": "Whether linear maps of the cut are fitted before training."})
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Seeds of the students, one run for each; default: `seed` alone."}
    )

    def __post_init__(self) -> None:
        if self.teacher is None and not self.train_teacher:
            raise ValueError("There is no teacher: name one with `--teacher`, or train one with `--train_teacher`.")
        for name in ("teacher_config", "student_config"):
            read_fields(name, getattr(self, name))
        if isinstance(layers_of(self.layers), str) and self.layers not in LAYER_CHOICES:
            raise ValueError(f"`layers` is {self.layers!r}; choose from {', '.join(LAYER_CHOICES)}, or name indices.")
        if self.channels not in (None, *CHANNEL_CHOICES):
            choices = ", ".join(map(str, (None, *CHANNEL_CHOICES)))
            raise ValueError(f"`channels` is {self.channels!r}; choose from {choices}.")


@dataclass
class ComparisonArguments(ModelArguments):
    """What to compare."""

    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": f"Objectives to train a student with: {', '.join(OBJECTIVES)}, or sums."},
    )
    variants: str | None = field(
        default=None,
        metadata={
            "help": "JSON: more students by names of your own, each with the fields in which it differs from the "
            'recipe, e.g. {"stones": {"stepping_stones": "last_two"}}.'
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        variants = self.named_variants()
        if not self.methods and not variants:
            raise ValueError(f"`methods` has no entry; choose from {', '.join(OBJECTIVES)}.")
        for method in self.methods:
            check_objective(method)
        fields = {one.name for one in dataclasses.fields(BlockwiseDistillConfig) if one.init}
        for name, changes in variants.items():
            if not isinstance(changes, dict):
                raise ValueError(f"`variants` has {changes!r} as {name!r}; give fields and values, in braces.")
            if name in {*METHODS, *self.methods} or Path(name).name != name:
                raise ValueError(f"`variants` has the name {name!r}, which is a method's or no name of a folder.")
            for own in changes:
                if own not in fields or own in ("output_dir", "seed"):
                    near = difflib.get_close_matches(own, sorted(fields), n=1)
                    advice = f"did you mean `{near[0]}`?" if near and near[0] != own else "give another."
                    raise ValueError(f"`variants` sets `{own}` of {name!r}, which no variant can; {advice}")

    def named_variants(self) -> dict[str, dict[str, Any]]:
        return read_fields("variants", self.variants)


def read_fields(argument: str, text: str | None, config: PreTrainedConfig | None = None) -> dict[str, Any]:
    """Fields and values that an argument holds as JSON.

    Args:
        argument: Its name.
        text: What it holds; `None` for no field.
        config: What the fields are to be set on.

    Raises:
        ValueError: If it is no JSON, or names no field of the config; the nearest is named.
    """
    try:
        fields = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f'`{argument}` is {text!r}, which is no JSON ({error}); write {{"field": value}}.') from error
    if not isinstance(fields, dict):
        raise ValueError(f'`{argument}` is {text!r}, which holds no fields; write {{"field": value}}.')
    if config is not None:
        check_fields(argument, fields, config)
    return fields


def check_fields(argument: str, names: Iterable[str], config: PreTrainedConfig) -> None:
    """Refuse names, of what an argument holds, that are no fields of a config."""
    for name in names:
        try:
            owners_of(config, config, name)
        except ValueError as error:
            raise ValueError(f"`{argument}` cannot be set: {error}") from error


class RecipeParser(FlagParser, HfArgumentParser):
    """Flags of an example, whose `--help` shows those of script, data and this library, and few of transformers'."""

    def group(self, dataclasses_of: dict[str, type], in_recipe: set[str]) -> None:
        """Say which flags stand together in the help.

        Args:
            dataclasses_of: Title -> the dataclass whose fields stand there.
            in_recipe: Fields that the recipe sets: also shown where they are those of transformers.
        """
        stock = {one.name for one in dataclasses.fields(TrainingArguments)}
        names = {title: {one.name for one in dataclasses.fields(kind)} for title, kind in dataclasses_of.items()}
        names["block-wise distillation"] = {one.name for one in dataclasses.fields(BlockwiseDistillConfig)} - stock
        names["training, as the recipe has it"] = (stock & in_recipe) | {"output_dir"}
        self.usage = "%(prog)s [RECIPE.yaml] [--FLAG VALUE ...]"
        self.epilog = "All fields of transformers.TrainingArguments are flags, too; a YAML file may set any of them."
        self.formatter_class = partial(HelpFormatter, max_help_position=32, width=110)
        for action in self._actions:
            # Shown by one of their names; both work.
            action.option_strings = action.option_strings[:1] if action.dest != "help" else action.option_strings
            action.metavar = "VALUE" if action.choices is None and action.nargs != 0 else None
        for title, own in names.items():
            shown = [action for action in self._actions if action.dest in own]
            self.add_argument_group(title)._group_actions = shown
        self._optionals._group_actions = [action for action in self._actions if action.dest == "help"]


class HelpFormatter(argparse.HelpFormatter):
    """Shows defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = action.default in (None, argparse.SUPPRESS) or action.nargs == 0
        return action.help if has_none else f"{action.help} (default: %(default)s)"


def parse_arguments(
    script: str | Path, data_arguments: type, script_arguments: type = ComparisonArguments, **defaults: Any
) -> tuple[Any, ...]:
    """Read the recipe of an example, a YAML file of the person's own, and the command line; the later wins.

    Args:
        script: `__file__` of the example, beside which its recipe lies.
        data_arguments: Its dataclass of arguments about data.
        script_arguments: Its dataclass of arguments about models.
        **defaults: Defaults of the example that none of them sets.

    Returns:
        The script's arguments, those about data, and BlockwiseDistillConfig.

    Raises:
        ValueError: If a file holds no recipe, or a name that is no field.
    """
    flags = sys.argv[1:]
    if flags and flags[0].endswith((".yaml", ".yml")):
        flags.insert(0, "--config")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    recipe, config = Path(script).with_suffix(".yaml"), first.parse_known_args(flags)[0].config
    parser = RecipeParser((script_arguments, data_arguments, BlockwiseDistillConfig))
    fields = {action.dest for action in parser._actions}
    values, own = _read_recipe(recipe, fields), {} if config is None else _read_recipe(Path(config), fields)
    given = set(own) | {flag.partition("=")[0].removeprefix("--") for flag in flags if flag.startswith("--")}
    for group in TOGETHER:
        if given & group:
            values = {name: value for name, value in values.items() if name not in group}
    values = {**defaults, **values, **own}
    parser.group({"models": script_arguments, "data": data_arguments}, set(values))
    parser.set_defaults(
        **{name: json.dumps(value) if isinstance(value, dict) else value for name, value in values.items()}
    )
    return parser.parse_args_into_dataclasses(flags)


def _read_recipe(path: Path, fields: set[str]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}; name a YAML file with fields and values.")
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; write a line `field: value` for each field.")
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), sorted(fields), n=1)
            advice = f"did you mean `{near[0]}`?" if near else "`--help` lists those that there are."
            raise ValueError(f"{path} sets `{name}`, which is no field of script, data or configuration; {advice}")
    return values
