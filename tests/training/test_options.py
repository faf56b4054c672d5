"""What `Trainer` can be asked for does here what it does there, or is refused by name before anything is loaded."""

import copy
import inspect

import numpy as np
import pytest
import torch
from accelerate import ParallelismConfig
from peft import LoraConfig
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer
from hf_blockkd.training.options import UNSUPPORTED, check_options

from ..helpers.tiny_models import tiny_bert, tiny_llama, tiny_vit
from ..helpers.training import (
    QUIET,
    assert_same_state,
    differs,
    image_rows,
    make_trainer,
    state_of,
    step_logs,
    text_rows,
    token_rows,
)

TIMES = ("runtime", "per_second", "mem_", "flos", "preparation_time")


def measured(prediction, compute_result=True):
    """Sums over whatever a metric may be given."""
    parts = (prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses)
    names = ("logits", "labels", "inputs", "losses")
    return {name: flat_sum(part) for name, part in zip(names, parts, strict=True) if part is not None}


def flat_sum(values):
    if isinstance(values, (list, tuple)):
        return sum(map(flat_sum, values))
    return float(np.abs(np.asarray(values, dtype=np.float64)).sum())


class SumOfBatches:
    """A metric of one batch after the other, which `batch_eval_metrics` asks for."""

    def __init__(self):
        self.total = 0.0

    def __call__(self, prediction, compute_result):
        self.total += flat_sum(prediction.predictions)
        return {"logits": self.total} if compute_result else {}


def without_times(entries):
    return {name: value for name, value in entries.items() if not any(word in name for word in TIMES)}


def outcome(trainer):
    trainer.train()
    metrics = without_times(trainer.evaluate())
    weights = {n: t for n, t in state_of(trainer.model).items() if not n.startswith("blockwise_connectors.")}
    return weights, metrics, [without_times(entry) for entry in step_logs(trainer)]


def compare(tmp_path, options, build=tiny_bert, rows=text_rows, settings=None, metric=lambda: measured):
    """Train the student alone, with our trainer and with the stock one: same bits, metrics and losses."""
    options = {**QUIET, "max_steps": 4, "learning_rate": 1e-2, **options}
    blocks = options.pop("num_blocks")
    torch.manual_seed(0)
    student, teacher = build(num_hidden_layers=2), build()
    data = {"train_dataset": rows(10), "eval_dataset": rows(6, seed=1)}
    args = TrainingArguments(str(tmp_path / "stock"), **copy.deepcopy(options))
    stock = outcome(Trainer(model=copy.deepcopy(student), args=args, compute_metrics=metric(), **data))
    args = BlockwiseDistillConfig(
        str(tmp_path / "ours"), num_blocks=blocks, objective="alone", **copy.deepcopy(options)
    )
    ours = outcome(
        BlockwiseDistillTrainer(
            model=student, teacher_model=teacher, args=args, compute_metrics=metric(), **data, **(settings or {})
        )
    )
    assert_same_state(ours[0], stock[0])
    assert ours[1] == stock[1]
    for entry, theirs in zip(ours[2], stock[2], strict=True):
        assert {name: entry[name] for name in theirs} == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"neftune_noise_alpha": 5.0},
        {"label_smoothing_factor": 0.1},
        {"include_for_metrics": ["inputs", "loss"]},
        {"fp16_full_eval": True},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=lambda options: " ".join(options),
)
def test_an_option_does_what_it_does_in_the_stock_trainer(tmp_path, options):
    compare(tmp_path, options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"label_names": ["labels"]},
        {"eval_do_concat_batches": False, "eval_accumulation_steps": 1},
        {"eval_use_gather_object": True},
        {"prediction_loss_only": True},
        {"bf16": True},
        {"bf16_full_eval": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
        {"optim": "adafactor"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
        {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_steps": 1},
        {"include_num_input_tokens_seen": "non_padding"},
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3, "dataloader_drop_last": True},
        {"remove_unused_columns": False},
        {"data_seed": 3},
        {"accelerator_config": {"split_batches": True}},
        {"accelerator_config": {"use_seedable_sampler": False, "even_batches": False, "non_blocking": True}},
        {"skip_memory_metrics": False},
        {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "eval_delay": 2},
        {"logging_first_step": True, "logging_steps": 3},
        {"num_train_epochs": 1.5, "max_steps": -1},
        {"torch_empty_cache_steps": 1},
    ],
    ids=lambda options: " ".join(options),
)
def test_so_do_the_others(tmp_path, options):
    compare(tmp_path, options)


@pytest.mark.slow
def test_metrics_can_be_computed_batch_by_batch(tmp_path):
    compare(tmp_path, {"batch_eval_metrics": True}, metric=SumOfBatches)


@pytest.mark.slow
def test_activations_that_overflow_can_be_looked_for(tmp_path):
    compare(tmp_path, {"debug": "underflow_overflow"}, build=tiny_llama, rows=token_rows)


@pytest.mark.slow
def test_full_determinism_can_be_asked_for(tmp_path):
    try:
        compare(tmp_path, {"full_determinism": True})
    finally:
        torch.use_deterministic_algorithms(False)


# ---- Refusals ----


class Arguments:
    """What the table looks at, of a process among two."""

    world_size = 2
    ddp_find_unused_parameters = False
    ddp_static_graph = None
    gradient_accumulation_steps = 2
    parallelism_config = None


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("ddp_find_unused_parameters", True, "`ddp_find_unused_parameters` is True, .*set it to False"),
        ("ddp_find_unused_parameters", None, "`ddp_find_unused_parameters` is None, .*set it to False"),
        ("ddp_static_graph", True, "`ddp_static_graph` is True, .*`gradient_accumulation_steps` to 1"),
        (
            "parallelism_config",
            ParallelismConfig(cp_size=2),
            r"(?s)`parallelism_config` is .*cp_size=2.*set it to None",
        ),
    ],
    ids=["unused-true", "unused-none", "static-graph", "parallelism"],
)
def test_an_option_that_cannot_work_is_refused_by_name(name, value, match):
    assert name in UNSUPPORTED
    args = Arguments()
    check_options(args, (None, None), None)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=match):
        check_options(args, (None, None), None)


def test_options_are_checked_before_a_model_is_loaded(tmp_path):
    settings = {**QUIET, "parallelism_config": ParallelismConfig(cp_size=2)}
    args = BlockwiseDistillConfig(str(tmp_path), **settings)
    with pytest.raises(ValueError, match="`parallelism_config`"):
        BlockwiseDistillTrainer(model="no/such student", teacher_model="no/such teacher", args=args)


def test_all_arguments_of_the_stock_trainer_are_known():
    theirs = set(inspect.signature(Trainer.__init__).parameters)
    assert theirs <= set(inspect.signature(BlockwiseDistillTrainer.__init__).parameters)


def test_a_hyperparameter_search_is_refused_with_a_way_around(tmp_path):
    trainer = make_trainer(tmp_path, tiny_vit(), tiny_vit(), image_rows(4))
    with pytest.raises(NotImplementedError, match=r"`hyperparameter_search` needs `model_init`.*make a new trainer"):
        trainer.hyperparameter_search(n_trials=1)


# ---- Optimizers ----


def test_the_connectors_join_an_optimizer_that_was_made_for_the_student(tmp_path):
    def trained(folder, own_optimizer):
        torch.manual_seed(0)
        student, teacher = tiny_vit(num_hidden_layers=2), tiny_vit()
        settings = {"max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "optim": "adamw_torch"}
        args = BlockwiseDistillConfig(str(folder), **{**QUIET, **settings})
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0) if own_optimizer else None
        trainer = BlockwiseDistillTrainer(
            model=student,
            teacher_model=teacher,
            args=args,
            train_dataset=image_rows(8),
            optimizers=(optimizer, None),
        )
        before = state_of(trainer.connectors)
        trainer.train()
        return before, trainer

    before, ours = trained(tmp_path / "own", own_optimizer=True)
    _, stock = trained(tmp_path / "stock", own_optimizer=False)
    assert differs(state_of(ours.connectors), before)
    assert_same_state(state_of(ours.model), state_of(stock.model))


def test_an_optimizer_made_before_the_adapter_is_refused(tmp_path):
    student = tiny_bert()
    args = BlockwiseDistillConfig(str(tmp_path), **QUIET)
    with pytest.raises(ValueError, match=r"`optimizers` and `peft_config` are both given.*get_peft_model"):
        BlockwiseDistillTrainer(
            model=student,
            teacher_model=tiny_bert(),
            args=args,
            optimizers=(torch.optim.SGD(student.parameters(), lr=0.1), None),
            peft_config=LoraConfig(target_modules=["query"]),
        )


# ---- What belongs to resuming ----


def test_early_stopping_stops_where_the_stock_trainer_does_also_after_a_resume(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 9}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "mark", "greater_is_better": True}
    options |= {"restore_callback_states_from_checkpoint": True}

    def trainer(folder, marks, **more):
        torch.manual_seed(0)
        student, teacher = tiny_vit(num_hidden_layers=2), tiny_vit()
        marks = iter(marks)
        return make_trainer(
            folder,
            student,
            teacher,
            image_rows(8),
            eval_dataset=image_rows(4, seed=1),
            compute_metrics=lambda prediction: {"mark": next(marks)},
            callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
            **{**options, **more},
        )

    marks = [0.1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    unbroken = trainer(tmp_path / "unbroken", marks)
    unbroken.train()
    assert unbroken.state.global_step == 5
    assert unbroken.state.best_model_checkpoint == str(tmp_path / "unbroken" / "checkpoint-2")
    resumed = trainer(tmp_path / "resumed", marks[4:])
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-4"))
    assert resumed.state.global_step == 5
    assert_same_state(state_of(resumed.model), state_of(unbroken.model))


class TooLarge:
    """A collator for which memory only suffices for so many examples."""

    def __init__(self, limit):
        self.limit, self.sizes = limit, []

    def __call__(self, rows):
        self.sizes.append(len(rows))
        if len(rows) > self.limit:
            raise RuntimeError("CUDA out of memory.")
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.slow
@pytest.mark.slow
def test_a_batch_size_that_fits_is_found_as_in_the_stock_trainer_and_kept_after_a_resume(tmp_path):
    options = {**QUIET, "max_steps": 4, "auto_find_batch_size": True, "per_device_train_batch_size": 6}
    options |= {"save_strategy": "steps", "save_steps": 2}
    blocks = options.pop("num_blocks")
    weights = {}
    for name in ("stock", "ours", "resumed"):
        torch.manual_seed(0)
        student, teacher = tiny_vit(num_hidden_layers=2), tiny_vit()
        collator = TooLarge(5)
        data = {"train_dataset": image_rows(24), "data_collator": collator}
        if name == "stock":
            trainer = Trainer(model=student, args=TrainingArguments(str(tmp_path / name), **options), **data)
        else:
            args = BlockwiseDistillConfig(str(tmp_path / name), num_blocks=blocks, objective="alone", **options)
            trainer = BlockwiseDistillTrainer(model=student, teacher_model=teacher, args=args, **data)
        trainer.train(str(tmp_path / "ours" / "checkpoint-2") if name == "resumed" else None)
        assert trainer._train_batch_size == trainer.state.train_batch_size == 5
        assert max(collator.sizes) == (5 if name == "resumed" else 6)
        weights[name] = {n: t for n, t in state_of(trainer.model).items() if "blockwise" not in n}
    assert get_last_checkpoint(str(tmp_path / "ours")).endswith("checkpoint-4")
    assert_same_state(weights["ours"], weights["stock"])
    assert_same_state(weights["resumed"], weights["ours"])


def test_the_table_names_fields_that_exist():
    assert set(UNSUPPORTED) <= set(TrainingArguments.__dataclass_fields__)
