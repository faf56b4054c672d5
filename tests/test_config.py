from __future__ import annotations

from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_blockkd import BlockwiseDistillConfig
from hf_blockkd.losses.divergences import DIVERGENCES

OWN_DEFAULTS = {
    "num_blocks": 4,
    "student_boundaries": None,
    "teacher_boundaries": None,
    "student_layers_path": None,
    "teacher_layers_path": None,
    "connector": "auto",
    "stepping_stones": "auto",
    "stones_per_step": 1,
    "stone_weighting": "halving",
    "task_weight": 1.0,
    "distill_weight": 1.0,
    "cross_weight": 0.0,
    "temperature": 2.0,
    "divergence": "forward_kl",
    "standardize_logits": False,
    "eval_stepping_stones": False,
}
STOCK_FIELDS = {field.name for field in fields(TrainingArguments)}
OWN_FIELDS = {field.name: field for field in fields(BlockwiseDistillConfig) if field.name not in STOCK_FIELDS}


def config(**values) -> BlockwiseDistillConfig:
    return BlockwiseDistillConfig(output_dir="unused", report_to="none", use_cpu=True, **values)


def from_command_line(*arguments: str) -> BlockwiseDistillConfig:
    parser = HfArgumentParser(BlockwiseDistillConfig)
    (parsed,) = parser.parse_args_into_dataclasses(["--output_dir", "unused", "--use_cpu", *arguments])
    return parsed


def from_yaml(folder, text: str) -> BlockwiseDistillConfig:
    file = folder / "config.yaml"
    file.write_text(f"output_dir: unused\nuse_cpu: true\n{text}")
    (parsed,) = HfArgumentParser(BlockwiseDistillConfig).parse_yaml_file(str(file))
    return parsed


def test_the_defaults_are_those_of_the_contract():
    made = config()
    assert {name: getattr(made, name) for name in OWN_DEFAULTS} == OWN_DEFAULTS
    assert made.ddp_find_unused_parameters is False


@pytest.mark.parametrize("name", OWN_FIELDS)
def test_every_field_of_our_own_has_a_help_text_and_a_place_in_the_docstring(name):
    assert OWN_FIELDS[name].metadata["help"]
    assert f"\n        {name} (" in BlockwiseDistillConfig.__doc__


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("all", "all"),
        ("none", "none"),
        ("sample", "sample"),
        ("1,3", [1, 3]),
        ("[1, 3]", [1, 3]),
        ("2", [2]),
        ([3, 1], [1, 3]),
        ([2, 2], [2]),
        (["1", "3"], [1, 3]),
        ((1, 2), [1, 2]),
        (2, [2]),
    ],
)
def test_stones_are_a_word_or_a_sorted_list(given, parsed):
    assert config(stepping_stones=given).stepping_stones == parsed


@pytest.mark.parametrize("given", ["some", "", "[]", [], "1;3", "1,", ["all"], None, "1.5", [1.5]])
def test_other_words_for_stones_are_refused(given):
    with pytest.raises(ValueError, match=r"`state_blocks` is .*choose 'last_two', 'all' or a list of indices"):
        config(state_blocks="none" if given is None else given)
    words = "'auto', 'last_two', 'all', 'none', 'sample', 'share'"
    with pytest.raises(ValueError, match=rf"`stepping_stones` is .*choose {words} or a list of indices"):
        config(stepping_stones=given)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"connector": "conv"}, "`connector` is 'conv', which is unknown; choose one of 'auto', 'linear'"),
        ({"divergence": "kl"}, "`divergence` is 'kl', which is unknown; choose one of 'forward_kl'"),
        ({"stone_weighting": "none"}, "`stone_weighting` is 'none', which is unknown; choose one of 'halving'"),
        ({"temperature": 0.0}, "`temperature` must be greater than 0, but is 0.0"),
        ({"beta": 1.5, "divergence": "jsd"}, "`beta` must be from 0 to 1, but is 1.5"),
        ({"beta": 0.9}, "`beta` is 0.9, but belongs to divergence='jsd', and `divergence` is 'forward_kl'"),
        ({"temperature": -1.0}, "`temperature` must be greater than 0"),
        ({"temperature": float("nan")}, "`temperature` must be greater than 0"),
        ({"task_weight": -0.1}, "`task_weight` must be 0 or a positive number, but is -0.1"),
        ({"distill_weight": float("inf")}, "`distill_weight` must be 0 or a positive number"),
        ({"cross_weight": float("nan")}, "`cross_weight` must be 0 or a positive number"),
        ({"task_weight": 0.0, "distill_weight": 0.0}, "are all 0, so there is nothing for objective"),
        ({"cross_weight": 1.0, "stepping_stones": "none"}, "`cross_weight` is 1.0, but with .*set it to 0"),
        ({"num_blocks": 0}, "`num_blocks` must be at least 1, but is 0"),
        ({"stones_per_step": 0}, "`stones_per_step` must be at least 1, but is 0"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            "asks for `use_reentrant=True`",
        ),
    ],
)
def test_what_no_model_could_be_trained_with_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"task_weight": 0.0},
        {"distill_weight": 0.0},
        {"task_weight": 0.0, "distill_weight": 0.0, "cross_weight": 0.5},
        {"stepping_stones": "none"},
        {"temperature": 0.5, "divergence": "dkd", "standardize_logits": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ],
)
def test_what_can_be_trained_with_is_taken_as_given(values):
    made = config(**values)
    assert {name: getattr(made, name) for name in values} == values


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["--stepping_stones", "1,3"], {"stepping_stones": [1, 3]}),
        (
            ["--stepping_stones", "sample", "--stones_per_step", "2"],
            {"stepping_stones": "sample", "stones_per_step": 2},
        ),
        (["--student_boundaries", "1", "3"], {"student_boundaries": [1, 3]}),
        (["--teacher_boundaries", "2", "4", "6"], {"teacher_boundaries": [2, 4, 6]}),
        (["--temperature", "4"], {"temperature": 4.0}),
        (["--standardize_logits"], {"standardize_logits": True}),
        (["--teacher_layers_path", "model.layers"], {"teacher_layers_path": "model.layers"}),
        (["--learning_rate", "0.5", "--num_blocks", "2"], {"learning_rate": 0.5, "num_blocks": 2}),
        ([], OWN_DEFAULTS),
        *((["--divergence", name], {"divergence": name}) for name in DIVERGENCES),
    ],
)
def test_a_command_line_sets_every_kind_of_field(arguments, values):
    parsed = from_command_line(*arguments)
    assert {name: getattr(parsed, name) for name in values} == values


@pytest.mark.parametrize("arguments", [["--divergence", "kl"], ["--connector", "conv"], ["--student_boundaries", "x"]])
def test_a_command_line_with_a_wrong_choice_ends_with_a_message(arguments, capsys):
    with pytest.raises(SystemExit):
        from_command_line(*arguments)
    assert f"argument {arguments[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("stepping_stones: [1, 3]", {"stepping_stones": [1, 3]}),
        ("stepping_stones: 1,3", {"stepping_stones": [1, 3]}),
        ("stepping_stones: 2", {"stepping_stones": [2]}),
        ("stepping_stones: none", {"stepping_stones": "none"}),
        ("student_boundaries: [1, 3]\nteacher_boundaries: [6, 12]", {"student_boundaries": [1, 3]}),
        ("temperature: 4\ndivergence: jsd", {"temperature": 4, "divergence": "jsd"}),
        ("cross_weight: 0.5\nlearning_rate: 1.0e-3", {"cross_weight": 0.5, "learning_rate": 1e-3}),
    ],
)
def test_a_yaml_file_sets_every_kind_of_field(text, values, tmp_path):
    parsed = from_yaml(tmp_path, text)
    assert {name: getattr(parsed, name) for name in values} == values


def test_an_unknown_field_in_yaml_is_refused(tmp_path):
    with pytest.raises(ValueError, match="steping_stones"):
        from_yaml(tmp_path, "steping_stones: all")


def test_a_config_survives_the_way_through_json():
    made = config(stepping_stones="1,3", student_boundaries=[1, 3])
    written = made.to_dict()
    (read,) = HfArgumentParser(BlockwiseDistillConfig).parse_dict(written, allow_extra_keys=True)
    assert {name: getattr(read, name) for name in OWN_DEFAULTS} == {name: getattr(made, name) for name in OWN_DEFAULTS}


def test_a_cache_in_the_student_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`use_cache` is True"):
        BlockwiseDistillConfig(str(tmp_path), use_cache=True)
