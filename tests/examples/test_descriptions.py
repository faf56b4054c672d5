"""A student and a teacher are described right, or are refused before either trains."""

import comparison
import distill_lm
import distill_vit
import pytest
from arguments import ComparisonArguments, ModelArguments
from comparison import check_pairs
from lm_data import LMDataArguments
from task import new_student

from ..helpers.images import TINY, draw, short_run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("images"), [(8, 8)] * 4)


@pytest.fixture
def compare(tmp_path, images, monkeypatch):
    """Compare students of a teacher of two layers, whose training fails the test."""

    def compare(fields=None, **script):
        script = ComparisonArguments(train_teacher=True, **{"methods": ["kd"], "teacher_config": TINY, **script})
        args = short_run(tmp_path / "run", **(fields or {}))
        comparison.compare(script, images, args, distill_vit.load_task(script, images))

    monkeypatch.setattr(comparison, "train_teacher", lambda *_: pytest.fail("the teacher was trained"))
    yield compare
    assert not (tmp_path / "run" / "settings.json").exists()


@pytest.mark.parametrize(
    ("script", "named"),
    [
        ({"student_layers": 1, "student_config": '{"num_hidden_layers": 2}'}, "`student_layers` is 1 and `num_hidden"),
        ({"student_config": '{"hiden_size": 8}'}, r"`hiden_size` is no field .* `hidden_size`"),
        ({"student_config": '{"hiden_size": 8}', "fresh": True}, r"`hiden_size` is no field .* `hidden_size`"),
        ({"student_config": '{"num_hidden_layers": 3}'}, "`num_layers` is 3"),
        ({"student_config": '{"hidden_size": 7}'}, "`hidden_size` is 7"),
        ({"student_config": '{"hidden_size": '}, "`student_config` is .* is no JSON"),
        ({"student_config": "[1]"}, "`student_config` is .* holds no fields"),
        ({"teacher_config": TINY.replace("hidden_size", "hiden_size")}, r"`hiden_size` is no field .* `hidden_size`"),
        ({"student_layers": 1, "fields": {"num_blocks": 2}}, "cannot be cut like this: .*num_blocks"),
        ({"student_layers": 1, "variants": '{"cut": {"num_blocks": 2}}'}, "cannot be cut like this: .*num_blocks"),
        (
            {"student_layers": 1, "variants": '{"cold": {"temperature": -1}}'},
            "`temperature` must be greater than 0, but is -1",
        ),
        ({"student_layers": 1, "layers": "best"}, "`layers` is 'best'"),
        ({"layers": "0,7"}, r"`layers` is \[0, 7\], but must be a rising list of layer indices from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_found_before_the_teacher_trains(compare, script, named):
    with pytest.raises(ValueError, match=named):
        compare(**script)


def test_the_cut_is_said_before_anything_trains_and_leaves_the_teacher_as_it_is(tmp_path, images, capsys):
    script = ComparisonArguments(train_teacher=True, teacher_config=TINY, student_layers=1, layers="kl")
    task = distill_vit.load_task(script, images)
    check_pairs(script, task, comparison._runs(script, short_run(tmp_path)))
    assert all(parameter.requires_grad for parameter in task.teacher.parameters())
    said = capsys.readouterr().out
    assert said.count(" parameters, the student ") == 1
    assert said.count("block") == 1


def test_a_fresh_student_has_the_depth_that_was_asked_for(images):
    script = ModelArguments(train_teacher=True, teacher_config=TINY, student_layers=1, fresh=True)
    task = distill_vit.load_task(script, images)
    assert len(new_student(script, task.teacher, task.auto_class, task.arguments()).vit.layers) == 1


def test_fields_of_a_new_language_model_are_its_own(tmp_path):
    (tmp_path / "a.txt").write_text("some words and more of them\n" * 100)
    data = LMDataArguments(train_file=str(tmp_path / "a.txt"), block_size=8, vocab_size=300)
    script = ModelArguments(train_teacher=True, teacher_config='{"model_type": "gpt2", "n_emb": 8}')
    with pytest.raises(ValueError, match=r"`n_emb` is no field of GPT2Config; did you mean `n_embd`"):
        distill_lm.load_task(script, data)
    script.teacher_config = '{"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 2}'
    assert distill_lm.load_task(script, data).teacher.config.n_embd == 8
