"""Labels that have no row of logits each: the rows are distilled, and the task loss is the model's own."""

import copy

import pytest
import torch
from torch.nn import functional as F

from ..helpers.tiny_models import LABELS, tiny_ctc, tiny_detr, tiny_dpt, tiny_segformer, tiny_yolos
from ..helpers.training import PLAIN_SGD, Gradients, make_trainer, max_difference, state_of, step_logs

TEMPERATURE = 2.0


def transcripts(count=8, seed=0):
    """Sounds of several lengths, padded to 200 samples, and texts of one to four tokens."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for i in range(count):
        mask, labels = torch.ones(200, dtype=torch.long), torch.full((4,), -100)
        mask[200 - 30 * (i % 3) :] = 0
        labels[: 1 + i % 4] = torch.randint(1, 12, (1 + i % 4,), generator=generator)
        sound = torch.randn(200, generator=generator) * mask
        rows.append({"input_values": sound, "attention_mask": mask, "labels": labels})
    return rows


def maps(count=8, size=16):
    """Images with a class for each pixel, of which more and more have none."""
    generator, rows = torch.Generator().manual_seed(0), []
    for i in range(count):
        labels = torch.randint(LABELS, (size, size), generator=generator)
        labels[:i] = 255
        rows.append({"pixel_values": torch.randn(1, size, size, generator=generator), "labels": labels})
    return rows


def objects(count=8, channels=1):
    """Images with two objects each."""
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in range(count):
        boxes = torch.rand(2, 4, generator=generator) * 0.4 + 0.1
        labels = {"class_labels": torch.randint(LABELS, (2,), generator=generator), "boxes": boxes}
        rows.append({"pixel_values": torch.randn(channels, 16, 16, generator=generator), "labels": labels})
    return rows


def collate(rows):
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "labels"}
    if "labels" not in rows[0]:
        return batch
    labels = [row["labels"] for row in rows]
    return {**batch, "labels": torch.stack(labels) if isinstance(labels[0], torch.Tensor) else labels}


CASES = {
    "ctc": (tiny_ctc, transcripts),
    "segmentation": (tiny_dpt, maps),
    "detection": (tiny_yolos, objects),
}


def one_step(folder, student, teacher, rows, **settings):
    gradients = Gradients()
    settings = {"objective": "kd", "per_device_train_batch_size": 8, "train_sampling_strategy": "sequential"} | settings
    settings = {**PLAIN_SGD, "temperature": TEMPERATURE, **settings}
    trainer = make_trainer(
        folder, copy.deepcopy(student), teacher, rows, callbacks=[gradients], max_steps=1, **settings
    )
    trainer.data_collator = collate
    trainer.train()
    return trainer, gradients.steps[0]


def frames_of(mask):
    """Of the two convolutions of `tiny_ctc`, written out."""
    return ((mask.sum(1) - 10) // 5 + 1 - 3) // 2 + 1


def task_by_hand(kind, student, logits, batch):
    """The mean over all of a window."""
    labels = batch["labels"]
    if kind == "ctc":
        lengths = (labels != -100).sum(1)
        log_probs = logits.log_softmax(-1).transpose(0, 1)
        each = [
            F.ctc_loss(log_probs[:, i, :][:t], labels[i, :n], t, n, reduction="sum") / n
            for i, (t, n) in enumerate(zip(frames_of(batch["attention_mask"]), lengths, strict=True))
        ]
        return sum(each) / len(each)
    if kind == "segmentation":
        resized = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(resized, labels, ignore_index=255)
    return student(**batch).loss


def loss_by_hand(kind, student, teacher, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ours, theirs = student(**inputs).logits, teacher(**inputs).logits.detach()
    task = task_by_hand(kind, student, ours, batch)
    if kind == "segmentation":
        ours, theirs = (logits.flatten(2).transpose(1, 2) for logits in (ours, theirs))
    counts = frames_of(batch["attention_mask"]) if kind == "ctc" else [ours.shape[1]] * len(ours)
    target = (theirs / TEMPERATURE).softmax(-1)
    kl = (target * (target.log() - (ours / TEMPERATURE).log_softmax(-1))).sum(-1) * TEMPERATURE**2
    distill = sum(own[:n].mean() for own, n in zip(kl, counts, strict=True)) / len(kl)
    return task, distill


@pytest.mark.parametrize("split", [(8, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("kind", CASES)
def test_however_a_batch_is_cut_the_step_is_that_of_the_loss_written_by_hand(tmp_path, kind, split):
    build, make_rows = CASES[kind]
    teacher, student, rows = build(), build(intermediate_size=20), make_rows()
    size, accumulation = split
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    trainer, step = one_step(tmp_path, student, teacher, rows, **settings)
    student.train()
    task, distill = loss_by_hand(kind, student, teacher, collate(rows))
    (task + distill).backward()
    logged = step_logs(trainer)[0]
    assert logged["loss_task"] == pytest.approx(task.item(), rel=1e-5)
    assert logged["loss_distill"] == pytest.approx(distill.item(), rel=1e-5)
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert max_difference({name: step[name] for name in expected}, expected) < 1e-6 * max(scale, 1)


@pytest.mark.parametrize("kind", CASES)
def test_stones_have_the_same_losses_however_a_batch_is_cut(tmp_path, kind):
    build, make_rows = CASES[kind]
    teacher, student, rows = build(), build(hidden_size=8), make_rows()
    settings = {"objective": "block_kd", "stepping_stones": "all", "connector_start": "random", "state_weight": 1.0}
    steps, logs = [], []
    for size, accumulation in [(8, 1), (4, 2), (2, 4)]:
        own = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, **settings}
        trainer, step = one_step(tmp_path, student, teacher, rows, **own)
        steps.append(step)
        logs.append(step_logs(trainer)[0])
    for step, log in zip(steps[1:], logs[1:], strict=True):
        assert max_difference(step, steps[0]) < 1e-5
        for name in ("loss", "stone_1/task", "stone_2/task", "stone_1/distill", "loss_state"):
            assert log[name] == pytest.approx(logs[0][name], rel=1e-5)


@pytest.mark.parametrize("kind", CASES)
def test_evaluation_is_the_models_own_loss(tmp_path, kind):
    build, make_rows = CASES[kind]
    teacher, student, rows = build(), build(hidden_size=8), make_rows(4)
    trainer = make_trainer(tmp_path, student, teacher, rows, eval_dataset=rows)
    trainer.data_collator = collate
    evaluated = trainer.evaluate() | trainer.evaluate_stepping_stones()
    with torch.no_grad():
        assert evaluated["eval_loss"] == pytest.approx(student(**collate(rows)).loss.item(), rel=1e-6)
        assert evaluated["eval_teacher_loss"] == pytest.approx(teacher(**collate(rows)).loss.item(), rel=1e-6)
    assert {"eval_stone_1_loss", "eval_stone_2_loss"} <= evaluated.keys()


def test_metrics_see_boxes_of_the_student_the_teacher_and_the_stones_at_one_place(tmp_path):
    teacher, student, rows = tiny_yolos(), tiny_yolos(hidden_size=8), objects(4)
    seen = []

    def metrics(prediction):
        (_, logits, boxes, *_), (labels,) = prediction.predictions[0], prediction.label_ids
        seen.append((logits, boxes))
        return {"images": len(labels), "objects": sum(len(one["boxes"]) for one in labels)}

    settings = {"eval_stepping_stones": True, "eval_do_concat_batches": False, "per_device_eval_batch_size": 4}
    trainer = make_trainer(tmp_path, student, teacher, rows, eval_dataset=rows, compute_metrics=metrics, **settings)
    trainer.data_collator = collate
    evaluated = trainer.evaluate()
    names = ("eval", "eval_teacher", "eval_stone_1", "eval_stone_2")
    assert [(evaluated[f"{name}_images"], evaluated[f"{name}_objects"]) for name in names] == [(4, 8)] * 4
    with torch.no_grad():
        for model, (logits, boxes) in zip((student, teacher), seen, strict=False):
            expected = model.eval()(**collate(rows))
            assert torch.allclose(torch.as_tensor(logits), expected.logits, atol=1e-6)
            assert torch.allclose(torch.as_tensor(boxes), expected.pred_boxes, atol=1e-6)
    assert len(seen) == 4


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("objective", ["kd", "block_kd", "fcfd"])
def test_rows_without_labels_train_on_the_teacher_alone(tmp_path, kind, objective):
    build, make_rows = CASES[kind]
    teacher, student, rows = build(), build(hidden_size=8), make_rows()
    bare = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    trainer, _ = one_step(tmp_path, student, teacher, bare, objective=objective)
    logged = step_logs(trainer)[0]
    assert logged["loss_task"] == 0.0
    assert logged["loss_distill"] > 0.0
    assert max_difference(state_of(trainer.model), state_of(student)) > 1e-4


def test_sounds_without_a_text_are_no_silence(tmp_path):
    """The transcripts that are there have a mean of their own, and all frames are distilled."""
    teacher, student, rows = tiny_ctc(), tiny_ctc(intermediate_size=20), transcripts()
    for row in rows[2:7]:
        row["labels"] = torch.full_like(row["labels"], -100)
    results = []
    for size, accumulation in [(8, 1), (2, 4)]:
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        results.append(one_step(tmp_path, student, teacher, rows, **settings))
    student.train()
    labelled = collate([row for row in rows if (row["labels"] != -100).any()])
    task, distill = (
        loss_by_hand("ctc", student, teacher, labelled)[0],
        loss_by_hand("ctc", student, teacher, collate(rows))[1],
    )
    (task + distill).backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    for trainer, step in results:
        assert step_logs(trainer)[0]["loss_task"] == pytest.approx(task.item(), rel=1e-5)
        assert max_difference({name: step[name] for name in expected}, expected) < 1e-5


def test_a_sum_over_texts_does_not_grow_with_the_batch(tmp_path):
    student, teacher = (tiny_ctc(ctc_loss_reduction="sum", num_hidden_layers=depth) for depth in (2, 3))
    logs = []
    for size, accumulation in [(8, 1), (2, 4)]:
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        logs.append(step_logs(one_step(tmp_path, student, teacher, transcripts(), **settings)[0])[0]["loss_task"])
    with torch.no_grad():
        expected = student(**collate(transcripts())).loss.item() / 8
    assert logs == pytest.approx([expected, expected], rel=1e-5)


def test_padding_of_a_sound_is_not_distilled(tmp_path):
    """However much a sound is padded."""
    teacher, student, rows = tiny_ctc(), tiny_ctc(intermediate_size=20), transcripts(4)
    longer = [
        {**row, **{name: F.pad(row[name], (0, 60)) for name in ("input_values", "attention_mask")}} for row in rows
    ]
    (_, first), (_, second) = (
        one_step(tmp_path, student, teacher, own, per_device_train_batch_size=4) for own in (rows, longer)
    )
    assert max_difference(first, second) < 1e-5


def test_shares_of_a_batch_have_the_labels_of_their_examples(tmp_path):
    for kind, (build, make_rows) in CASES.items():
        trainer, _ = one_step(
            tmp_path / kind, build(hidden_size=8), build(), make_rows(), objective="block_kd", stepping_stones="share"
        )
        assert step_logs(trainer)[0]["stone_2/task"] > 0


@pytest.mark.parametrize(("build", "rows"), [(tiny_segformer, lambda: maps(4, 32)), (tiny_detr, lambda: objects(4, 3))])
def test_stages_and_decoders_train_end_to_end(tmp_path, build, rows):
    trainer, _ = one_step(tmp_path, build(), build(), rows(), objective="block_kd", per_device_train_batch_size=4)
    assert step_logs(trainer)[0]["loss_task"] > 0


BAD = {
    "a class that is none": (
        "ctc",
        lambda row: row["labels"].fill_(12),
        "`labels` holds 12, but Wav2Vec2ForCTC has 12",
    ),
    "no text": ("ctc", lambda row: row.update(labels=torch.tensor(1)), r"takes class indices .*length of a text\)"),
    "a pixel of no class": ("segmentation", lambda row: row["labels"].fill_(7), "`labels` holds 7, but"),
    "an object of no class": ("detection", lambda row: row["labels"]["class_labels"].fill_(9), "`labels` holds 9, but"),
    "objects without boxes": ("detection", lambda row: row["labels"].pop("boxes"), "one dictionary of `class_labels`"),
}


@pytest.mark.parametrize("case", BAD)
def test_labels_that_do_not_fit_are_told_before_the_first_step(tmp_path, case):
    kind, spoil, message = BAD[case]
    build, make_rows = CASES[kind]
    rows = make_rows(4)
    for row in rows:
        spoil(row)
    trainer = make_trainer(tmp_path, build(hidden_size=8), build(), rows, max_steps=1)
    trainer.data_collator = collate
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_heads_whose_rows_do_not_pair_up_are_refused():
    with pytest.raises(
        ValueError, match=r"logits of shape \(5, 32, 32\) for one example and the teacher .* \(5, 64, 64\)"
    ):
        make_trainer("unused", tiny_dpt(patch_size=8), tiny_dpt(), maps())
    with pytest.raises(ValueError, match="`pad_token_id` is 1 for the student and 0 for the teacher"):
        make_trainer("unused", tiny_ctc(pad_token_id=1), tiny_ctc(), transcripts())
    with pytest.raises(
        ValueError, match=r"`label_smoothing_factor` is 0\.1, but Wav2Vec2ForCTC trains on its own loss"
    ):
        make_trainer("unused", tiny_ctc(), tiny_ctc(), transcripts(), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="`teacher_cache` is 'cache', but YolosForObjectDetection gives as many rows"):
        make_trainer("unused", tiny_yolos(), tiny_yolos(), objects(), objective="kd", teacher_cache="cache")
