"""What a plan counts, against hand computations, direct measurements and the trainer's own refusals."""

import re

import pytest

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer
from hf_blockkd.plan import costs
from hf_blockkd.plan.costs import Plan, make_plan
from hf_blockkd.plan.counting import count_step, counting_trainer, labelled_batch

from ..helpers import tiny_models as tiny
from ..helpers.training import assert_same_state, image_rows, make_trainer, state_of, step_logs

PUBLISHED = {"num_blocks": 2, "connector_start": "random"}
"""No errors of states."""


@pytest.fixture(autouse=True)
def _stones_alone(request, monkeypatch) -> None:
    """Other objectives, each of which needs a trainer of its own, are counted where a test asks for `others`."""
    if "others" not in request.fixturenames:
        monkeypatch.setattr(costs, "OTHERS", ())


@pytest.fixture
def others() -> None: ...


def plan_of(student, teacher, batch_size=8, sequence_length=None, **config) -> Plan:
    args = BlockwiseDistillConfig("unused", use_cpu=True, **{**PUBLISHED, **config})
    return make_plan(student, teacher, args, batch_size, sequence_length)


def vit_pair(**student):
    teacher = tiny.tiny_vit(hidden_size=32, num_hidden_layers=4, intermediate_size=40)
    return tiny.tiny_vit(**{"num_hidden_layers": 2, **student}), teacher


def vit_forward_flops(width: int, inner: int, layers: int) -> dict[str, int]:
    """Multiply-adds times two of one 8x8 image with 4 patches of 4x4, a class token and 5 classes."""
    tokens = 5
    return {
        "patches": 2 * 4 * 16 * width,
        "linear": layers * 2 * tokens * (4 * width * width + 2 * width * inner) + 2 * width * tiny.LABELS,
        "attention": layers * 2 * 2 * tokens * tokens * width,
    }


# ---- FLOPs ----


def test_a_sum_of_objectives_runs_the_stones_that_its_run_would():
    def flops(**config):
        fitted = {"connector_start": "least_squares", "state_weight": None, "stone_weight": None}
        return plan_of(*vit_pair(), num_blocks=2, **{**fitted, "stepping_stones": "auto", **config}).chosen.flops

    hints = flops(objective="hint")
    states = flops(objective="block_kd+hint")
    assert hints < states < 1.1 * hints
    assert flops(objective="block_kd+hint", stepping_stones="none") == hints
    assert flops(objective="block_kd+hint", state_weight=0.0) > 1.2 * hints


def test_what_a_server_captured_is_planned_with_stones_and_without_states():
    models = tiny.tiny_llama(num_hidden_layers=2), tiny.tiny_llama()
    fitted = {"connector_start": "least_squares", "state_weight": None, "stone_weight": None, "temperature": 1.0}
    settings = {**fitted, "num_blocks": 2, "stepping_stones": "auto", "captured_columns": ["prompt_logprobs"]}
    plan = plan_of(*models, **settings)
    assert plan.chosen.name == "all stones"
    assert "states, no stones" not in [step.name for step in plan.steps]


def test_plain_kd_costs_the_flops_of_a_hand_computation():
    student, teacher = vit_pair(num_hidden_layers=1)
    forward = vit_forward_flops(width=16, inner=24, layers=1)
    # A backward takes two products per product, five instead of two in attention, which computes its scores anew, and
    # none for the gradient of the pixels.
    steps = 2 * forward["patches"] + 3 * forward["linear"] + 3.5 * forward["attention"]
    clean = sum(vit_forward_flops(width=32, inner=40, layers=4).values())

    plan = plan_of(student, teacher, batch_size=6, num_blocks=1)

    assert plan.steps[0].flops == 6 * (steps + clean)


def test_last_stone_adds_the_flops_of_its_connector_and_of_the_teachers_head_and_embeddings():
    student, teacher = vit_pair()
    connector = 3 * 2 * 5 * 16 * 32  # forward, and backward to weights and states
    head = 2 * 2 * 32 * tiny.LABELS  # forward, and backward to states: the teacher's weights get no gradient
    patches = 2 * 4 * 16 * 32

    assert plan_of(student, teacher, batch_size=1).stones[-1].flops == connector + head + patches


def test_a_stone_adds_its_suffix_forward_and_backward_to_the_states_alone():
    """Nothing below its entry, no gradient of a teacher weight, and no second clean pass."""
    student, teacher = vit_pair()
    suffix = vit_forward_flops(width=32, inner=40, layers=2)  # two of four layers, with the head
    connector = 3 * 2 * 5 * 16 * 32
    backward = suffix["linear"] + 2.5 * suffix["attention"]
    expected = suffix["patches"] + suffix["linear"] + suffix["attention"] + backward + connector

    assert plan_of(student, teacher, batch_size=1).stones[0].flops == expected


def test_more_stones_cost_more_flops_and_more_memory_the_lower_they_are(others):
    student, teacher = vit_pair()
    plan = plan_of(student, teacher)

    plain, shared, sampled, every, *others = plan.steps
    names = ["plain KD", "shared examples", "sampled stones (1 of 2)", "all stones"]
    assert [step.name for step in plan.steps[:4]] == names
    assert [step.name for step in others] == ["ladder", "alone", "hint", "simkd", "fcfd", "theseus"]
    assert plain.flops < sampled.flops < every.flops
    assert plain.memory < shared.memory < sampled.memory < every.memory
    assert plan.stones[0].flops > plan.stones[1].flops > 0
    assert every.flops == plain.flops + plan.stones[0].flops + plan.stones[1].flops
    first, second = (stone.flops for stone in plan.stones)
    assert shared.flops == pytest.approx(sampled.flops) == pytest.approx(plain.flops + first / 3 + second * 2 / 3)


def test_what_runs_on_part_of_the_examples_or_steps_costs_part():
    student, teacher = vit_pair()
    plan = plan_of(student, teacher)
    plain, shared, _, every, *_ = plan.steps
    half = plan_of(student, teacher, stone_fraction=0.5)
    flops = [(step.flops + plain.flops) / 2 for step in plan.steps[:4]]
    assert [step.flops for step in half.steps[:4]] == pytest.approx(flops)
    assert half.steps[3].activations == pytest.approx((plain.activations + every.activations) / 2)
    rare = plan_of(student, teacher, stones_every=2, stepping_stones="share")
    assert rare.chosen.flops == pytest.approx((shared.flops + plain.flops) / 2)
    assert rare.chosen.activations == shared.activations
    uniform = plan_of(student, teacher, stone_sampling="uniform")
    assert uniform.steps[1].flops == uniform.steps[2].flops == pytest.approx((plain.flops + every.flops) / 2)


def test_without_a_weight_stones_cost_nothing_and_are_still_counted():
    with_stones, without = plan_of(*vit_pair()), plan_of(*vit_pair(), stone_weight=0.0, state_weight=0.0)
    assert without.chosen is without.steps[0]
    assert without.steps == with_stones.steps


def test_sampling_every_stone_costs_what_all_stones_cost():
    plan = plan_of(*vit_pair(), stepping_stones="sample", stones_per_step=2)
    assert plan.chosen is plan.steps[2]
    assert plan.chosen.flops == plan.steps[3].flops
    assert plan.chosen.memory == pytest.approx(plan.steps[3].memory, rel=0.01)


@pytest.mark.parametrize(
    ("builder", "config"),
    [
        (tiny.tiny_vit, {}),
        (tiny.tiny_llama, {"loss_chunk_size": 0}),
        (tiny.tiny_llama, {"loss_chunk_size": 30}),  # 11 or 22 rows do not fill a chunk, but 55 do
        (tiny.tiny_t5, {}),
        (tiny.tiny_deberta, {}),
    ],
    ids=["vit", "llama", "llama-chunked", "t5", "deberta"],
)
def test_costs_at_a_batch_size_are_those_that_a_step_of_that_size_has(builder, config):
    student, teacher = builder(), builder()
    length = None if builder is tiny.tiny_vit else 12
    plan = plan_of(student, teacher, batch_size=5, sequence_length=length, **config)
    args = BlockwiseDistillConfig("unused", use_cpu=True, **PUBLISHED, **config)
    with counting_trainer(student, teacher, args) as trainer:
        flops, activations = count_step(trainer, labelled_batch(trainer, 5, length))

    assert plan.chosen.flops == pytest.approx(flops, rel=1e-3)
    assert plan.chosen.activations == pytest.approx(activations, rel=0.01)


def test_a_chunked_loss_keeps_no_logits():
    whole, chunked = (
        plan_of(tiny.tiny_llama(), tiny.tiny_llama(), sequence_length=12, loss_chunk_size=size).steps[0]
        for size in (0, 16)
    )
    log_probabilities = 8 * 4 * 11 * tiny.VOCABULARY
    gradient_of_the_head = 4 * 16 * tiny.VOCABULARY
    assert whole.activations - chunked.activations > 2 * log_probabilities - gradient_of_the_head


# ---- Memory and parameters ----


def test_memory_of_weights_gradients_and_optimizer_is_that_of_their_tensors():
    student, teacher = vit_pair()
    weights = sum(parameter.numel() for parameter in student.parameters())
    teacher_weights = sum(parameter.numel() for parameter in teacher.parameters())
    connector = 16 * 32 + 32

    plan = plan_of(student, teacher, connector="linear", stepping_stones=[2])
    plain, shared, sampled, every, only_second, *_ = plan.steps

    assert (plan.student_parameters, plan.teacher_parameters) == (weights, teacher_weights)
    assert [stone.parameters for stone in plan.stones] == [connector, connector]
    assert {step.parameters for step in plan.steps} == {4 * (weights + teacher_weights + 2 * connector)}
    assert plain.gradients == 4 * weights
    assert only_second.gradients == 4 * (weights + connector)
    assert shared.gradients == sampled.gradients == every.gradients == 4 * (weights + 2 * connector)
    assert all(step.optimizer == 2 * step.gradients for step in plan.steps)
    assert plan.chosen is only_second
    assert only_second.name == "stones 2"


def test_frozen_parameters_of_the_student_take_no_gradients():
    student, teacher = vit_pair()
    student.vit.embeddings.requires_grad_(False)
    frozen = sum(parameter.numel() for parameter in student.vit.embeddings.parameters())
    plain = plan_of(student, teacher).steps[0]
    assert plain.gradients == 4 * (sum(parameter.numel() for parameter in student.parameters()) - frozen)


def test_an_mlp_connector_keeps_the_input_and_the_output_of_its_gelu():
    linear, mlp = (plan_of(*vit_pair(), connector=kind, stepping_stones=[2]).chosen for kind in ("linear", "mlp"))
    assert mlp.activations - linear.activations == 8 * 4 * 2 * 5 * 32  # examples, bytes, tensors, tokens, width


def test_activations_hold_nothing_of_the_teachers_clean_forward():
    narrow, wide = (
        plan_of(tiny.tiny_vit(), tiny.tiny_vit(hidden_size=width), num_blocks=1).steps[0] for width in (32, 64)
    )
    assert narrow.activations == wide.activations


def test_activations_hold_no_weights():
    inner = 4000
    student, teacher = tiny.tiny_vit(), tiny.tiny_vit(intermediate_size=inner)
    every = plan_of(student, teacher, batch_size=1, num_blocks=3).steps[2]
    assert 4 * 5 * inner < every.activations < 4 * 2 * 16 * inner  # more than a GELU's input, less than one MLP


# ---- Tasks ----


@pytest.mark.parametrize(
    ("builder", "head"),
    [
        (tiny.tiny_bert, "SequenceClassification"),
        (tiny.tiny_bert, "TokenClassification"),
        (tiny.tiny_bert, "QuestionAnswering"),
        (tiny.tiny_bert, "MultipleChoice"),
        (tiny.tiny_bert, "MaskedLM"),
        (tiny.tiny_roberta, "SequenceClassification"),
        (tiny.tiny_llama, "CausalLM"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_head_gets_labels_it_can_be_trained_on(builder, head):
    plan = plan_of(builder(head), builder(head), sequence_length=12)
    assert plan.example == ((2, 12) if head == "MultipleChoice" else (12,))
    assert plan.steps[0].flops < plan.steps[2].flops


@pytest.mark.parametrize("config", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_regression_and_multi_label_heads_get_labels(config):
    plan = plan_of(tiny.tiny_bert(**config), tiny.tiny_bert(**config), sequence_length=12)
    assert plan.chosen.flops > 0


def test_longer_texts_cost_more_per_token_for_attention():
    def pair():
        return tiny.tiny_llama(), tiny.tiny_llama()

    short, long = (plan_of(*pair(), sequence_length=length).chosen.flops for length in (10, 20))
    assert long > 2.05 * short


@pytest.mark.parametrize("sizes", [(80, 70), (70, 80)])
def test_dummy_texts_are_known_to_both_vocabularies(sizes):
    student, teacher = (tiny.tiny_llama(vocab_size=size) for size in sizes)
    with counting_trainer(student, teacher, BlockwiseDistillConfig("unused", use_cpu=True, num_blocks=2)) as trainer:
        token_ids = labelled_batch(trainer, 64, 12)["input_ids"]
    assert token_ids.shape == (64, 12)
    assert 60 <= token_ids.max() < 70


def test_a_pair_of_other_layouts_has_its_bridges_named_and_keeps_the_statistics_of_its_batch_norms():
    student = tiny.tiny_resnet(hidden_sizes=[4, 8, 12], depths=[1, 1, 1])
    before = state_of(student)
    plan = plan_of(student, tiny.tiny_vit(image_size=32, patch_size=8), num_blocks=3)
    assert [stone.connector for stone in plan.stones] == [
        "linear 4 -> 16, 8x8 -> class + 4x4",
        "linear 8 -> 16, 4x4 -> class + 4x4",
        "linear 12 -> 16, 2x2 -> class + 4x4",
    ]
    assert "linear 4 -> 16, 8x8 -> class + 4x4" in str(plan)
    assert plan.example == (1, 32, 32)  # of the teacher, where the student names no size
    assert_same_state(state_of(student), before)


def test_the_images_of_a_plan_are_those_of_the_student():
    plan = plan_of(tiny.tiny_vit(image_size=16), tiny.tiny_vit(), connector="mlp")
    assert plan.example == (1, 16, 16)
    assert plan.stones[0].connector == "mlp 16 -> 16, class + 4x4 -> class + 2x2"


# ---- What it leaves behind, and what it refuses ----


def test_a_plan_leaves_the_weights_and_the_training_as_they_were(tmp_path):
    student, teacher = vit_pair()
    before, teacher_before = state_of(student), state_of(teacher)
    plan_of(student, teacher)
    assert_same_state(state_of(student), before)
    assert_same_state(state_of(teacher), teacher_before)
    assert not student.training
    assert all(parameter.grad is None for parameter in (*student.parameters(), *teacher.parameters()))

    planned = make_trainer(tmp_path, student, teacher, image_rows(), max_steps=2)
    planned.train()
    other_student, other_teacher = vit_pair()
    other_student.load_state_dict(before)
    other_teacher.load_state_dict(teacher_before)
    unplanned = make_trainer(tmp_path, other_student, other_teacher, image_rows(), max_steps=2)
    unplanned.train()
    assert [log["loss"] for log in step_logs(planned)] == [log["loss"] for log in step_logs(unplanned)]


def test_a_plan_warns_of_nothing_that_concerns_a_run(caplog):
    student = tiny.tiny_vit(num_hidden_layers=2).half()  # which trains badly
    plan_of(student, tiny.tiny_vit().half())
    assert not caplog.records
    make_args = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, **PUBLISHED}
    BlockwiseDistillTrainer(
        model=student, teacher_model=tiny.tiny_vit(), args=BlockwiseDistillConfig("unused", **make_args)
    )
    assert "trains in float16" in caplog.text


def test_a_plan_writes_nothing_into_the_output_folder(tmp_path):
    student, teacher = vit_pair()
    args = BlockwiseDistillConfig(str(tmp_path / "run"), use_cpu=True, num_blocks=2, stepping_stones="none")
    make_plan(student, teacher, args)
    assert list(tmp_path.iterdir()) == []
    assert args.output_dir == str(tmp_path / "run")
    assert args.stepping_stones == "none"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_blocks": 3}, "`num_blocks` is 3, but the student has only 2 layers"),
        ({"stepping_stones": [3]}, "`stepping_stones` names stone 3"),
        ({"stepping_stones": "sample", "stones_per_step": 3}, "`stones_per_step` is 3"),
        ({"connector": "identity"}, "connector='identity' needs equal widths"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, but is 0"),
        ({"sequence_length": 16}, "`sequence_length` is 16, but ViTForImageClassification takes images"),
    ],
)
def test_what_training_would_refuse_is_refused(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_of(*vit_pair(), **config)


@pytest.mark.parametrize("builder", [tiny.tiny_bert, tiny.tiny_roberta, tiny.tiny_gpt2])
def test_more_tokens_than_positions_are_refused(builder):
    with pytest.raises(ValueError, match=r"do not run on examples of 41 tokens .* set `sequence_length`"):
        plan_of(builder(), builder(), sequence_length=41)


# ---- Print ----


def test_print_shows_map_stones_parameters_and_the_chosen_setting():
    plan = plan_of(*vit_pair(), stepping_stones="sample")
    text = str(plan)
    assert str(plan.block_map) in text
    assert "linear 16 -> 32" in text
    assert f"{plan.teacher_parameters:,}" in text
    assert re.search(r"sampled stones \(1 of 2\) \*  ", text)
    assert re.search(r"plain KD .*\s1\.00 .*\s1\.00$", text, re.MULTILINE)
    ratio = plan.steps[3].flops / plan.steps[0].flops
    assert re.search(rf"all stones .* {ratio:.2f} ", text)
    assert text.count("*") == 2
    assert "FLOPs are counted" in text


# ---- Objectives ----


@pytest.mark.parametrize("objective", ["alone", "hint", "simkd", "fcfd", "theseus", "block_kd+hint"])
@pytest.mark.parametrize("builder", [tiny.tiny_vit, tiny.tiny_llama])
def test_the_cost_of_an_objective_is_that_of_its_own_steps(builder, objective):
    models = builder(num_hidden_layers=2), builder(num_hidden_layers=4)
    length = None if builder is tiny.tiny_vit else 12
    fields = {"objective": objective, "loss_chunk_size": 0}
    plan = plan_of(*models, batch_size=5, sequence_length=length, **fields)
    args = BlockwiseDistillConfig("unused", use_cpu=True, **PUBLISHED, **fields)
    with counting_trainer(*models, args) as trainer:
        batch, counts = labelled_batch(trainer, 5, length), []
        for trainer.state.global_step in range(4):
            trainer.state.max_steps = 4
            counts.append(count_step(trainer, batch))
    flops, activations = zip(*counts, strict=True)
    assert plan.chosen.name == objective
    assert plan.chosen.flops == pytest.approx(sum(flops) / 4, rel=1e-3)
    assert plan.chosen.activations == pytest.approx(max(activations), rel=0.01)


def test_the_student_alone_costs_plain_distillation_without_the_teachers_pass(others):
    student, teacher = vit_pair()
    plan = plan_of(student, teacher)
    alone = next(step for step in plan.steps if step.name == "alone")
    clean = sum(vit_forward_flops(width=32, inner=40, layers=4).values())
    assert plan.steps[0].flops - alone.flops == 8 * clean
    assert plan_of(student, teacher, objective="kd").chosen is not alone


def test_plain_distillation_is_the_setting_without_stones():
    models = tiny.tiny_vit(num_hidden_layers=2), tiny.tiny_vit()
    assert plan_of(*models, objective="kd").chosen.name == "plain KD"


@pytest.mark.parametrize("stepping_stones", ["last_two", "sample", [2]])
def test_errors_of_states_are_connectors_of_the_chosen_stones_once_more(stepping_stones):
    models, chosen = vit_pair(), [2] if stepping_stones == [2] else [1, 2]
    with_states, without = (
        plan_of(*models, batch_size=1, stepping_stones=stepping_stones, state_weight=weight) for weight in (5.0, 0.0)
    )
    connectors = len(chosen) * 3 * 2 * 5 * 16 * 32  # forward, and backward to weights and states
    assert with_states.chosen.flops == pytest.approx(without.chosen.flops + connectors)
    no_stones = plan_of(*models, batch_size=1, stepping_stones=stepping_stones, state_weight=5.0, stone_weight=0.0)
    assert no_stones.chosen.name == "states, no stones"
    assert no_stones.chosen.flops == without.steps[0].flops + connectors
    assert no_stones.chosen.gradients == with_states.chosen.gradients


def test_the_default_has_errors_of_states_and_a_teacher_cache_has_none():
    def names(**config):
        return [step.name for step in plan_of(*vit_pair(), connector_start="least_squares", **config).steps]

    assert "states, no stones" in names()
    assert "states, no stones" not in names(teacher_cache="folder")


def test_an_objective_that_the_models_do_not_fit_is_named_with_the_reason(others, monkeypatch):
    def refuse(student, teacher, args, objective, *sizes):
        if objective == "theseus":
            raise ValueError("No path leads back.")
        return measured(student, teacher, args, objective, *sizes)

    measured = costs.objective_cost
    monkeypatch.setattr(costs, "objective_cost", refuse)
    plan = plan_of(*vit_pair())
    assert "theseus" not in [step.name for step in plan.steps]
    assert "`theseus` is not counted: No path leads back." in str(plan)
    with pytest.raises(ValueError, match="No path leads back"):
        plan_of(*vit_pair(), objective="theseus")


def test_a_connector_that_begins_as_the_identity_is_called_by_what_it_trains():
    stone = plan_of(tiny.tiny_vit(), tiny.tiny_vit()).stones[0]
    assert (stone.connector, stone.parameters) == ("identity + linear 16 -> 16", 16 * 16 + 16)


def test_what_a_run_evaluates_or_recomputes_does_not_matter():
    models = tiny.tiny_vit(num_hidden_layers=2), tiny.tiny_vit()
    plain = plan_of(*models)
    assert str(plan_of(*models, eval_strategy="epoch", activation_checkpointing=True)) == str(plain)


@pytest.mark.parametrize("build", [tiny.tiny_ctc, tiny.tiny_segformer, tiny.tiny_yolos])
def test_heads_whose_labels_have_another_form_have_a_plan(build):
    plan = plan_of(build(), build(), batch_size=2)
    assert [stone.flops > 0 for stone in plan.stones] == [True, True]
