"""A recipe of one's own changes what it says, and nothing else; lengths are shares of whatever run it becomes."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import arguments
import comparison
import distill_vit
import pytest
import yaml
from image_data import ImageDataArguments
from lm_data import LMDataArguments
from text_data import TextDataArguments
from transformers import TrainingArguments

from hf_blockkd import BlockwiseDistillConfig

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Arguments of an example for a command line, and a YAML file where one is given."""

    def parse(*flags, own=None, example="distill_vit", data=ImageDataArguments):
        if own is not None:
            (tmp_path / "own.yaml").write_text(own)
        flags = [flag.replace("OWN", str(tmp_path / "own.yaml")) for flag in flags]
        monkeypatch.setattr(sys, "argv", ["script", "--output_dir", str(tmp_path), *flags])
        if flags and not flags[0].startswith("--"):
            monkeypatch.setattr(sys, "argv", ["script", *flags, "--output_dir", str(tmp_path)])
        return arguments.parse_arguments(EXAMPLES / f"{example}.py", data)

    return parse


@pytest.mark.parametrize("flags", [["--config", "OWN"], ["--config=OWN"], ["OWN"]])
def test_what_an_own_file_leaves_out_stays_as_in_the_recipe(parse, flags):
    script, data, args = parse(*flags, own="dataset: own/images\nlearning_rate: 5.0e-4\n")
    assert (data.dataset, args.learning_rate) == ("own/images", 5e-4)
    recipe = yaml.safe_load((EXAMPLES / "distill_vit.yaml").read_text())
    assert args.per_device_train_batch_size == recipe["per_device_train_batch_size"] == 64
    assert args.num_train_epochs == recipe["num_train_epochs"]
    assert script.train_teacher
    assert '"num_hidden_layers": 6' in script.teacher_config
    assert '"num_hidden_layers": 3' in script.student_config


def test_flags_win_over_an_own_file(parse):
    _, _, args = parse("--config", "OWN", "--learning_rate", "0.25", own="learning_rate: 0.5\nseed: 7\n")
    assert (args.learning_rate, args.seed) == (0.25, 7)


@pytest.mark.parametrize("own", [None, "student_config: {num_hidden_layers: 3, hidden_size: 96}\n"])
def test_a_student_that_is_described_anew_has_nothing_of_the_recipes(parse, own):
    flags = ["--config", "OWN"] if own else ["--student_config", '{"num_hidden_layers": 3, "hidden_size": 96}']
    script, _, _ = parse(*flags, own=own, example="distill_text_classification", data=TextDataArguments)
    assert script.student_layers is None
    assert "96" in script.student_config
    script, _, _ = parse("--student_layers", "2")
    assert (script.student_layers, script.student_config) == (2, None)


def test_another_data_set_has_not_the_configuration_of_the_recipes(parse):
    _, data, _ = parse("--dataset", "own/text", example="distill_lm", data=LMDataArguments)
    assert (data.dataset, data.dataset_config) == ("own/text", None)


def test_an_unknown_field_is_named_with_the_nearest(parse):
    with pytest.raises(ValueError, match=r"own.yaml sets `learning_rat`, .* did you mean `learning_rate`\?"):
        parse("--config", "OWN", own="learning_rat: 1.0\n")


def test_what_is_no_recipe_is_refused(parse):
    with pytest.raises(ValueError, match=r"There is no file 'absent\.yaml'"):
        parse("--config", "absent.yaml")
    with pytest.raises(ValueError, match="holds a list"):
        parse("--config", "OWN", own="- a\n- b\n")


def test_help_shows_the_values_of_recipe_and_own_file(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--config", "OWN", "--help", own="num_train_epochs: 77\n")
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: 77)" in said
    assert "(default: 64)" in said  # the recipe's batch size


def test_help_names_each_of_our_flags_once_and_leaves_out_most_of_transformers(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 200
    stock = {field.name for field in fields(TrainingArguments)}
    for name in (field.name for field in fields(BlockwiseDistillConfig)):
        assert said.count(f"  --{name} ") <= 1
        assert name in stock or f"  --{name} " in said, name
    assert "--adam_beta1" not in said


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--teacherr", "x"], "there is no flag --teacherr; did you mean --teacher?"),
        (["--adam_beta3", "0.9"], "there is no flag --adam_beta3; did you mean --adam_beta2?"),
        (["--learning_rate", "fast"], "argument --learning_rate: invalid float value: 'fast'"),
    ],
)
def test_a_mistyped_flag_is_answered_with_one_line(parse, capsys, flags, line):
    with pytest.raises(SystemExit):
        parse(*flags)
    assert capsys.readouterr().err.rstrip().endswith(line)


def test_a_mistake_in_data_is_one_sentence_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "distill_vit.py", "--dataset", tmp_path / "nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.rstrip().endswith("there is no such file; correct the path.")


@pytest.mark.parametrize("example", ["distill_vit", "distill_text_classification", "distill_lm"])
def test_lengths_of_recipes_are_shares_of_the_run(example):
    recipe = yaml.safe_load((EXAMPLES / f"{example}.yaml").read_text())
    for name in ("warmup_steps", "logging_steps", "eval_steps"):
        assert 0 < recipe[name] < 1, name
    assert recipe["eval_strategy"] == "steps"


def test_a_short_run_by_the_recipe_logs_losses_and_has_a_curve(parse, tmp_path, capsys):
    pytest.importorskip("mlxtend")
    flags = ["--methods", "kd", "--max_steps", "4", "--teacher_epochs", "0.01", "--fit", "false"]
    script, data, args = parse(*flags, "--per_device_train_batch_size", "2", "--save_strategy", "no")
    task = distill_vit.load_task(script, data)
    task.train_set, task.eval_set = task.train_set.select(range(300)), task.eval_set.select(range(20))
    args.remove_unused_columns = False
    comparison.compare(script, data, args, task)
    assert capsys.readouterr().out.partition("plain KD, seed")[2].count("'loss': ") == 4
    student = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert len(student["curve"]) >= 4
