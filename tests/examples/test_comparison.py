"""A comparison that is cut keeps what it has, goes on where it was, and grows by what is asked for next."""

import json

import comparison
import distill_vit
import pytest
import torch
from arguments import ComparisonArguments
from safetensors.torch import load_file

from hf_blockkd import BlockwiseDistillTrainer
from hf_blockkd.commands.cli import main
from hf_blockkd.commands.report.runs import read_log_history

from ..helpers.images import TINY, draw, short_run


@pytest.fixture
def images(tmp_path):
    return draw(tmp_path / "images", [(8, 8)] * 20)


@pytest.fixture
def trained(monkeypatch):
    """Output folders of the students that were trained, and what they went on from."""
    runs, train = [], BlockwiseDistillTrainer.train

    def recorded(self, resume_from_checkpoint=None, **kwargs):
        runs.append((self.args.output_dir, bool(resume_from_checkpoint)))
        return train(self, resume_from_checkpoint, **kwargs)

    monkeypatch.setattr(BlockwiseDistillTrainer, "train", recorded)
    return runs


def compare(folder, images, fields=None, **script) -> list[dict]:
    """The lines of the results after a comparison."""
    script = {"methods": ["alone", "kd"], "teacher_config": TINY, "teacher_epochs": 1, "student_layers": 1, **script}
    script = ComparisonArguments(train_teacher=True, **script)
    args = short_run(folder, seed=0, eval_strategy="steps", eval_steps=1, **(fields or {}))
    comparison.compare(script, images, args, distill_vit.load_task(script, images))
    return lines(folder)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def without_time(runs: list[dict]) -> list[dict]:
    return [{name: value for name, value in run.items() if name != "seconds"} for run in runs]


def cut(monkeypatch, evaluation: int, *arguments, **script) -> None:
    """A comparison whose process ends, in effect, at an evaluation of the student by plain KD, from 1."""
    evaluate, calls = BlockwiseDistillTrainer.evaluate, []

    def stop(self, *args, **kwargs):
        if self.args.output_dir.endswith("kd"):
            calls.append(self)
            if len(calls) == evaluation:
                raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(BlockwiseDistillTrainer, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            compare(*arguments, **script)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "kd" / "model.safetensors")


def test_a_comparison_that_was_cut_ends_as_one_that_was_not(tmp_path, images, trained, monkeypatch, capsys):
    unbroken = compare(tmp_path / "unbroken", images)
    assert [run["model"] for run in unbroken] == ["teacher", "student alone", "student, plain KD"]
    cut(monkeypatch, 1, tmp_path / "cut", images)
    assert without_time(lines(tmp_path / "cut")) == without_time(unbroken[:2])
    trained.clear()
    monkeypatch.setattr(comparison, "train_teacher", None)
    assert without_time(compare(tmp_path / "cut", images)) == without_time(unbroken)
    assert trained == [(str(tmp_path / "cut" / "kd"), False)]
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "unbroken"), rtol=0, atol=0)
    said = capsys.readouterr().out.rpartition("training\n")[2]
    assert all(run["model"] in said for run in unbroken)


def test_a_student_that_was_cut_goes_on_from_its_checkpoint(tmp_path, images, trained, monkeypatch):
    saving = {"save_strategy": "steps", "save_steps": 1}
    unbroken = compare(tmp_path / "unbroken", images, saving, methods=["kd"])
    cut(monkeypatch, 2, tmp_path / "cut", images, saving, methods=["kd"])
    trained.clear()
    resumed = compare(tmp_path / "cut", images, saving, methods=["kd"])
    assert trained == [(str(tmp_path / "cut" / "kd"), True)]
    assert without_time(resumed) == without_time(unbroken)
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "unbroken"), rtol=0, atol=0)
    assert resumed[-1]["seconds"] is None


def test_methods_variants_and_seeds_of_later_calls_join_the_table(tmp_path, images, trained, capsys):
    compare(tmp_path, images, methods=["block_kd"])
    trained.clear()
    variants = '{"no stones": {"stone_weight": 0.0}, "hot KD": {"objective": "kd", "temperature": 9.0}}'
    runs = compare(tmp_path, images, methods=["block_kd"], variants=variants, seeds=[0, 1])
    names = [(run["model"], run["seed"]) for run in runs]
    assert names == [
        ("teacher", None),
        ("student, Block-KD", 0),
        ("student, no stones", 0),
        ("student, hot KD", 0),
        ("student, Block-KD", 1),
        ("student, no stones", 1),
        ("student, hot KD", 1),
    ]
    assert len(trained) == 5
    assert json.loads((tmp_path / "no stones" / "seed_1" / "training_args.json").read_text())["stone_weight"] == 0
    hot = json.loads((tmp_path / "hot KD" / "seed_0" / "training_args.json").read_text())
    assert (hot["objective"], hot["temperature"]) == ("kd", 9.0)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("student, no stones  "))
    assert row.split()[3] == "2"
    assert "±" in row


def test_the_path_that_was_evaluated_is_reported(tmp_path, images, capsys):
    run = compare(tmp_path, images, methods=["block_kd"])[-1]
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "pictures")]) == 0
    assert str(tmp_path / "pictures" / "block_kd" / "path.png") in capsys.readouterr().out
    last = [entry for entry in read_log_history(tmp_path / "block_kd") if "eval_stone_1_accuracy" in entry][-1]
    assert run["path"]["N_1"] == last["eval_stone_1_accuracy"]


def test_another_comparison_does_not_mix_with_the_one_of_the_folder(tmp_path, images, trained):
    variants = '{"warm": {"temperature": 3.0}}'
    compare(tmp_path, images, methods=[], variants=variants)
    trained.clear()
    for change, named in (
        ({"fields": {"learning_rate": 0.25}}, r"`learning_rate` is 0\.25, but 5e-05 in the comparison"),
        ({"teacher_epochs": 2}, "`teacher_epochs` is 2, but 1 in"),
        ({"variants": variants.replace("3", "4")}, r"`warm` is .*4\.0.*, but .*3\.0.* in"),
    ):
        with pytest.raises(ValueError, match=named):
            compare(tmp_path, images, **{"methods": [], "variants": variants, **change})
    assert trained == []
    # How a run is logged is no other comparison.
    compare(tmp_path, images, {"logging_steps": 1}, methods=[], variants=variants)


@pytest.mark.parametrize(
    ("variants", "named"),
    [
        ('{"kd": {"temperature": 3}}', "has the name 'kd', which is a method's"),
        ('{"a/b": {"temperature": 3}}', "has the name 'a/b'"),
        ('{"warm": 3}', "has 3 as 'warm'; give fields and values"),
        ('{"warm": {"temprature": 3}}', r"sets `temprature` of 'warm', .* did you mean `temperature`\?"),
        ('{"warm": {"seed": 3}}', "sets `seed` of 'warm'"),
    ],
)
def test_what_is_no_variant_is_refused(variants, named):
    with pytest.raises(ValueError, match=named):
        ComparisonArguments(train_teacher=True, variants=variants)
