"""What cannot be trained is refused before the first update, by a message that says what to change."""

import copy
import re

import pytest
import torch
from transformers import TrainingArguments, ViTForImageClassification, ViTModel
from transformers.utils import logging

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer, UnsupportedArchitectureError

from ..helpers.tiny_models import VOCABULARY, scrambled, tiny_bert, tiny_gpt2, tiny_llama, tiny_resnet, tiny_vit
from ..helpers.training import (
    Lazy,
    assert_same_state,
    file_bytes,
    image_rows,
    make_trainer,
    state_of,
    text_rows,
    token_rows,
)

ANIMALS = ["cat", "dog", "emu", "fox", "gnu"]


def named(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


@pytest.fixture
def folder(tmp_path):
    """An output folder that already holds a run."""
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "model.safetensors").write_bytes(b"months of work")
    (tmp_path / "notes.txt").write_text("mine")
    return tmp_path


@pytest.fixture(autouse=True)
def _what_was_there_stays(folder):
    before = file_bytes(folder)
    yield
    assert {name: content for name, content in file_bytes(folder).items() if name in before} == before


def refused(folder, student, teacher, match, rows=None, error=ValueError, **settings):
    """Whatever is wrong shows when the trainer is built, or at its first step at the latest."""
    before = {id(model): state_of(model) for model in (student, teacher)}
    with pytest.raises(error) as raised:
        make_trainer(folder, student, teacher, rows or image_rows(8), max_steps=2, **settings).train()
    assert re.search(match, str(raised.value), re.DOTALL), raised.value
    for model in (student, teacher):
        after = {n: t for n, t in state_of(model).items() if not n.startswith("blockwise_connectors.")}
        assert_same_state(after, before[id(model)])


# ---- Settings ----


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"stepping_stones": [1, 4]}, "`stepping_stones` names stone 4.*stones 1 to 2"),
        ({"stepping_stones": [0]}, "`stepping_stones` names stone 0.*stones 1 to 2"),
        ({"stepping_stones": "some"}, "`stepping_stones` is 'some'.*'all', 'none', 'sample'"),
        ({"stepping_stones": []}, r"`stepping_stones` is \[\]"),
        ({"stepping_stones": "sample", "stones_per_step": 3}, "`stones_per_step` is 3.*2 stepping stones"),
        ({"stepping_stones": "sample", "stones_per_step": 0}, "`stones_per_step` must be at least 1, but is 0"),
        ({"num_blocks": 0}, "`num_blocks` must be at least 1, but is 0"),
        ({"num_blocks": 4}, "`num_blocks` is 4, but the student has only 3 layers"),
        ({"student_boundaries": [2, 1, 3]}, r"`student_boundaries` must be a rising list.*\[2, 1, 3\]"),
        ({"student_boundaries": [0, 3]}, r"`student_boundaries` must be a rising list.*\[0, 3\]"),
        ({"teacher_boundaries": [2, 2, 4]}, r"`teacher_boundaries` must be a rising list.*\[2, 2, 4\]"),
        ({"student_boundaries": [1, 2]}, r"`student_boundaries` \[1, 2\] ends at layer 2.*student has 3 layers"),
        ({"teacher_boundaries": [1, 5]}, r"`teacher_boundaries` \[1, 5\] ends at layer 5.*teacher has 4 layers"),
        ({"student_boundaries": [3], "teacher_boundaries": [2, 4]}, r"\[3\] makes 1 blocks.*\[2, 4\] makes 2"),
        ({"connector": "magic"}, "`connector` is 'magic'.*'linear'"),
        ({"divergence": "hellinger"}, "`divergence` is 'hellinger'.*'forward_kl'"),
        ({"stone_weighting": "cubic"}, "`stone_weighting` is 'cubic'.*'halving'"),
        ({"temperature": 0.0}, "`temperature` must be greater than 0, but is 0.0"),
        ({"temperature": -1.0}, "`temperature` must be greater than 0, but is -1.0"),
        ({"temperature": float("nan")}, "`temperature` must be greater than 0, but is nan"),
        ({"task_weight": -0.5}, "`task_weight` must be 0 or a positive number, but is -0.5"),
        ({"distill_weight": -1}, "`distill_weight` must be .*but is -1"),
        ({"cross_weight": float("inf")}, "`cross_weight` must be .*but is inf"),
        ({"task_weight": 0, "distill_weight": 0, "cross_weight": 0}, "`task_weight`.*are all 0"),
        ({"cross_weight": 1.0, "stepping_stones": "none"}, "`cross_weight` is 1.0.*`stepping_stones='none'`"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "`use_reentrant=True`"),
        ({"student_layers_path": "vit.nowhere"}, "'vit.nowhere'.*ViTForImageClassification.*vit.layers"),
        ({"teacher_layers_path": "vit.layernorm"}, "'vit.layernorm'.*LayerNorm"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work(folder, settings, match):
    refused(folder, tiny_vit(), tiny_vit(num_hidden_layers=4), match, **settings)


def test_several_gpus_in_one_process_are_told_of_accelerate(folder):
    args = BlockwiseDistillConfig(str(folder), report_to="none")
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs are visible.*accelerate launch --num_processes 2"):
        BlockwiseDistillTrainer(model=tiny_vit(), teacher_model=tiny_vit(), args=args)


def test_plain_training_arguments(folder):
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="`args` is a TrainingArguments; pass a BlockwiseDistillConfig"):
        BlockwiseDistillTrainer(model=tiny_vit(), teacher_model=tiny_vit(), args=args)


# ---- Models ----


def test_one_model_in_both_roles(folder):
    model = tiny_vit()
    refused(folder, model, model, "`model` and `teacher_model` are the same object")


def test_models_that_share_weights(folder):
    student, teacher = tiny_vit(), tiny_vit()
    student.vit.embeddings = teacher.vit.embeddings
    refused(folder, student, teacher, "share parameters")


def geometry(**config):
    return lambda: tiny_vit(**config)


@pytest.mark.parametrize(
    ("student", "teacher", "match"),
    [
        (geometry(), geometry(num_labels=7), "`num_labels` is 5 for the student and 7 for the teacher"),
        (
            geometry(**named(ANIMALS)),
            geometry(**named([*ANIMALS[:4], "yak"])),
            r"`id2label\[4\]` is 'gnu' for the student and 'yak' for the teacher",
        ),
        (
            geometry(**named(ANIMALS)),
            geometry(**named([ANIMALS[1], ANIMALS[0], *ANIMALS[2:]])),
            r"`id2label\[0\]` is 'cat' for the student and 'dog' for the teacher",
        ),
        (
            geometry(problem_type="multi_label_classification"),
            geometry(problem_type="single_label_classification"),
            "`problem_type` is 'multi_label_classification' for the student and 'single_label_classification'",
        ),
        (
            geometry(image_size=16),
            geometry(),
            "ViTForImageClassification does not run on images of 8x8 .*`image_size` .it is .16, 16..",
        ),
        (geometry(num_channels=3), geometry(), "`num_channels` is 3 for the student.* and 1 for the teacher"),
        (geometry(), tiny_bert, "ViTForImageClassification.*image classification.*BertForSequenceClassification"),
        (tiny_bert, lambda: tiny_bert("TokenClassification"), "sequence classification.*token classification"),
        (lambda: tiny_bert("MaskedLM"), tiny_llama, "BertForMaskedLM.*LlamaForCausalLM"),
        (
            geometry(),
            lambda: ViTModel(tiny_vit().config),
            "`teacher_model` is a ViTModel, which has no head for image classification",
        ),
        (lambda: tiny_bert(None), tiny_bert, r"BertModel without a head.*`teacher_model\.base_model`"),
    ],
)
def test_models_that_do_not_fit(folder, student, teacher, match):
    refused(folder, student(), teacher(), match)


def test_identity_connectors_between_unequal_widths(folder):
    student = tiny_vit(hidden_size=12, num_attention_heads=3)
    refused(folder, student, tiny_vit(), "connector='identity'.* 12 wide .* 16;", connector="identity")


def test_a_teacher_whose_layers_cannot_be_found_is_unsupported(folder):
    with pytest.raises(UnsupportedArchitectureError, match="ResNetForImageClassification"):
        make_trainer(folder, tiny_vit(), tiny_resnet(), image_rows(4), teacher_layers_path="resnet.nothing")


class LeakyViT(ViTForImageClassification):
    """Adds what left the first layer to its logits, past all other layers."""

    def __init__(self, config):
        super().__init__(config)
        self.vit.layers[0].register_forward_hook(self.keep)

    def keep(self, layer, args, output):
        self.kept = output

    def forward(self, pixel_values=None, **kwargs):
        outputs = super().forward(pixel_values, **kwargs)
        outputs.logits = outputs.logits + self.classifier(self.kept[:, 0])
        return outputs


def test_a_subclass_under_another_name_has_the_task_of_its_base(folder):
    class Renamed(ViTForImageClassification):
        """Another name is no other task."""

    config = tiny_vit(problem_type="multi_label_classification").config
    rows = [{**row, "labels": torch.ones(5)} for row in image_rows(4)]
    make_trainer(folder / "run", Renamed(config), Renamed(config), rows, max_steps=1).train()


def test_a_teacher_that_cannot_be_routed_fails_its_self_test_before_the_first_update(folder):
    teacher = scrambled(LeakyViT(tiny_vit().config)).eval()
    match = "LeakyViT entered at layer .*differ from its own.*`hf-blockkd check`"
    refused(folder, tiny_vit(), teacher, match, error=UnsupportedArchitectureError)


# ---- Data ----


def without(rows, name):
    return [{key: value for key, value in row.items() if key != name} for row in rows]


@pytest.mark.parametrize(
    ("build", "rows"),
    [(tiny_vit, image_rows), (tiny_bert, text_rows), (tiny_llama, token_rows)],
    ids=["vit", "bert", "llama"],
)
def test_labels_that_are_missing(folder, build, rows):
    without_labels = without(rows(4), "labels")
    message = "`objective` is 'alone', so that labels alone would train, but no row of `train_dataset` has one"
    refused(folder, build(), build(), message, rows=without_labels, objective="alone")


def test_a_missing_half_of_an_answer(folder):
    rows = [{**row, "start_positions": torch.tensor(1)} for row in without(text_rows(4), "labels")]
    models = tiny_bert("QuestionAnswering"), tiny_bert("QuestionAnswering")
    refused(folder, *models, "end_positions missing.*BertForQuestionAnswering", rows=rows)


@pytest.mark.parametrize("wrong", [5, -1, -99])
def test_labels_out_of_range(folder, wrong):
    rows = image_rows(8)
    for row in rows:
        row["labels"] = torch.tensor(wrong)
    refused(folder, tiny_vit(), tiny_vit(), f"`labels` holds {wrong}.*5 classes, 0 to 4", rows=rows)


def test_tokens_out_of_the_vocabulary_as_labels(folder):
    rows = token_rows(4)
    rows[1]["labels"][-1] = 64
    refused(folder, tiny_gpt2(), tiny_gpt2(), "`labels` holds 64.*64 classes, 0 to 63", rows=rows)


def relabelled(rows, make):
    return [{**row, "labels": make(i)} for i, row in enumerate(rows)]


SINGLE, MULTI = "single_label_classification", "multi_label_classification"
MANY = torch.tensor([1, 0, 0, 1, 0])
FORMS = {
    "several classes as whole numbers": (
        tiny_bert,
        MULTI,
        lambda i: MANY,
        r"shape \(4, 5\) and dtype torch.int64.*float",
    ),
    "the same of an open problem": (tiny_bert, None, lambda i: MANY, r"\(4, 5\) and dtype torch.int64.*\.float\(\)"),
    "the same as truth values": (tiny_vit, MULTI, lambda i: MANY.bool(), r"\(4, 5\) and dtype torch.bool.*float"),
    "too few of several classes": (tiny_vit, MULTI, lambda i: MANY[:4].float(), r"\(4, 4\) .*\(batch, 5\)"),
    "class indices of several classes": (tiny_vit, MULTI, lambda i: torch.tensor(1.0), r"\(4,\) .*\(batch, 5\)"),
    "fractions for a class": (tiny_vit, SINGLE, lambda i: torch.tensor(1.0), r"\(4,\) and dtype torch.float32.*whole"),
    "fractions of an open problem": (tiny_vit, None, lambda i: torch.tensor(1.0), r"\(4,\) and dtype torch.float32"),
    "a row for a class": (
        tiny_vit,
        SINGLE,
        lambda i: torch.eye(5)[i % 5],
        r"\(4, 5\) and dtype torch.float32.*\(batch,\)",
    ),
    "one class for all tokens": (
        lambda **_: tiny_bert("TokenClassification"),
        None,
        lambda i: torch.tensor(1),
        r"\(4, 6\)",
    ),
    "a class for every other token": (
        lambda **_: tiny_llama(),
        None,
        lambda i: torch.ones(3).long(),
        r"\(4, 3\).*\(4, 6\)",
    ),
    "targets of another shape": (
        lambda **_: tiny_vit(num_labels=1),
        None,
        lambda i: torch.ones(3),
        r"\(4, 3\).*\(batch, 1\)",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_of_another_form_than_the_heads(folder, form):
    build, problem, make, match = FORMS[form]
    fields = {} if problem is None else {"problem_type": problem}
    student, teacher = build(**fields), build(**fields)
    rows = text_rows(8) if student.main_input_name == "input_ids" else image_rows(8)
    refused(folder, student, teacher, match, rows=Lazy(relabelled(rows, make)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("settings", [{}, {"divergence": "dkd"}, {"label_smoothing_factor": 0.1}])
def test_whole_numbers_of_any_size_are_classes(folder, dtype, settings):
    losses = []
    for rows in (image_rows(8), relabelled(image_rows(8), lambda i: torch.tensor(i * 3 % 5, dtype=dtype))):
        torch.manual_seed(0)
        trainer = make_trainer(
            folder / str(len(losses)), tiny_vit(), tiny_vit(), rows, eval_dataset=rows, max_steps=1, **settings
        )
        losses.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))
    assert losses[0] == losses[1]


def test_one_column_of_classes_and_whole_numbers_to_regress_on_are_taken(folder):
    for number, (model, make) in enumerate(
        [(tiny_vit, lambda i: torch.tensor([i % 5])), (lambda: tiny_vit(num_labels=1), lambda i: torch.tensor(i))]
    ):
        rows = relabelled(image_rows(8), make)
        trainer = make_trainer(folder / str(number), model(), model(), rows, eval_dataset=rows, max_steps=1)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0


def test_a_label_that_the_teachers_vocabulary_lacks(folder):
    student = tiny_bert("MaskedLM")
    student.resize_token_embeddings(65)
    rows = token_rows(8)
    for row in rows:
        row["labels"][-1] = 64
    refused(folder, student, tiny_bert("MaskedLM"), "`labels` holds 64, but BertForMaskedLM has 64 classes", rows=rows)


def broken_run(folder, rows, match, **settings):
    """A run with a checkpoint at each step, which is to break."""
    trainer = make_trainer(
        folder / "run",
        tiny_vit(num_hidden_layers=2),
        tiny_vit(),
        rows,
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        **settings,
    )
    with pytest.raises(ValueError, match=match):
        trainer.train()
    return trainer


def assert_stopped_after_two_steps(folder, trainer):
    assert trainer.state.global_step == 2
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    saved = ViTForImageClassification.from_pretrained(folder / "run" / "checkpoint-2")
    weights = {n: t for n, t in state_of(trainer.model).items() if not n.startswith("blockwise_connectors.")}
    assert_same_state(state_of(saved), weights)


def test_a_wrong_label_stops_the_run_before_the_update_it_would_spoil(folder):
    rows = image_rows(16)
    rows[10]["labels"] = torch.tensor(9)
    trainer = broken_run(folder, Lazy(rows), "`labels` holds 9")
    assert_stopped_after_two_steps(folder, trainer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_teacher_logits_that_are_not_finite_stop_the_run_with_step_and_rows(folder, value):
    rows = image_rows(16)
    for i in (9, 11):
        rows[i]["pixel_values"] = torch.full((1, 8, 8), value)
    trainer = broken_run(folder, rows, r"not finite for examples \[1, 3\] .*step 3")
    assert_stopped_after_two_steps(folder, trainer)


def test_teacher_logits_that_are_not_finite_are_told_from_a_wrong_route_at_the_first_step(folder):
    rows = image_rows(4)
    rows[2]["pixel_values"] = torch.full((1, 8, 8), float("nan"))
    settings = {"train_sampling_strategy": "sequential"}
    refused(folder, tiny_vit(), tiny_vit(), r"not finite for examples \[2\] .*step 1", rows=rows, **settings)


def test_a_refusal_leaves_the_models_as_they_were(folder):
    student, teacher = tiny_vit(), tiny_vit(num_labels=7)
    copies = copy.deepcopy((student, teacher))
    refused(folder, student, teacher, "`num_labels`")
    for model, before in zip((student, teacher), copies, strict=True):
        assert_same_state(state_of(model), state_of(before))
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_teacher_of_another_run_does_not_become_a_student_that_stays_frozen(folder):
    small, large = tiny_bert(num_hidden_layers=2), tiny_bert()
    make_trainer(folder, large, small, text_rows(), max_steps=1).train()
    for student in (small, copy.deepcopy(small)):
        with pytest.raises(ValueError, match="No weight of the student BertForSequenceClassification requires grad"):
            make_trainer(folder, student, large, text_rows())
    make_trainer(folder, small.requires_grad_(True), large, text_rows())


def test_options_of_trainer_that_are_not_taken_are_refused_by_name(folder):
    first = make_trainer(folder, tiny_bert(num_hidden_layers=2), tiny_bert(), text_rows())
    parts = {"model": first.model, "teacher_model": first.teacher, "args": first.args, "train_dataset": text_rows()}
    with pytest.raises(ValueError, match="`model_init` is given"):
        type(first)(**parts, model_init=tiny_bert)
    first.args.connector_learning_rate = 0.1
    with pytest.raises(ValueError, match=r"`connector_learning_rate` is 0\.1, but `optimizers` is given, too"):
        type(first)(**parts, optimizers=(torch.optim.SGD(first.model.parameters()), None))


def test_a_student_in_float16_without_a_scaler_is_warned_of(folder, caplog):
    logger = logging.get_logger("hf_blockkd.trainer")
    logger.addHandler(caplog.handler)
    try:
        make_trainer(folder, tiny_bert(num_hidden_layers=2).half(), tiny_bert(), text_rows())
    finally:
        logger.removeHandler(caplog.handler)
    assert "trains in float16 without a gradient scaler" in caplog.text


def test_an_id_without_a_row_is_named_in_a_prediction_without_labels(folder):
    trainer = make_trainer(folder, tiny_bert(num_hidden_layers=2), tiny_bert(), text_rows())
    with pytest.raises(ValueError, match=f"`input_ids` holds {VOCABULARY}, but"):
        trainer.predict([{"input_ids": torch.tensor([3, VOCABULARY])}] * 4)
