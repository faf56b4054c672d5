"""The teacher's clean outputs, computed once: the same training, and never with somebody else's outputs."""

import copy
import json
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from hf_blockkd.data.example_keys import KeyedCollator, example_keys
from hf_blockkd.data.mapped_rows import MappedRows
from hf_blockkd.data.teacher_cache import DESCRIPTION, TeacherCache
from hf_blockkd.losses.top_k import top_k

from ..helpers.tiny_models import tiny_bert, tiny_deberta, tiny_llama, tiny_t5, tiny_vit
from ..helpers.training import (
    PLAIN_SGD,
    file_bytes,
    image_rows,
    make_trainer,
    max_difference,
    state_of,
    step_logs,
    text_rows,
    token_rows,
)


def bert(head="SequenceClassification", **config):
    return tiny_bert(head, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **config)


def multi_label_rows(count=8):
    return [{**row, "labels": torch.eye(5)[i % 5]} for i, row in enumerate(image_rows(count))]


def regression_rows(count=8):
    return [{**row, "labels": torch.tensor(0.3 * i)} for i, row in enumerate(text_rows(count))]


def tag_rows(count=8):
    return [{**row, "labels": row["labels"].clamp(max=4)} for row in token_rows(count)]


CASES = {
    "image-classes": (tiny_vit, {}, image_rows, {}),
    "dkd": (tiny_vit, {}, image_rows, {"divergence": "dkd", "standardize_logits": True}),
    "multi-label": (tiny_vit, {"problem_type": "multi_label_classification"}, multi_label_rows, {}),
    "regression": (bert, {"num_labels": 1}, regression_rows, {}),
    "tags": (partial(bert, "TokenClassification"), {}, tag_rows, {}),
    # With all but one token kept, the rest is the last one: nothing is lost but digits.
    "causal": (tiny_llama, {}, token_rows, {"teacher_cache_top_k": 10_000}),
    "causal-in-chunks": (tiny_llama, {}, token_rows, {"teacher_cache_top_k": 10_000, "loss_chunk_size": 5}),
    "masked": (partial(bert, "MaskedLM"), {}, token_rows, {"teacher_cache_top_k": 10_000, "divergence": "jsd"}),
}


def run(folder, student, teacher, rows, **settings):
    settings = {"num_train_epochs": 2, "temperature": 2.0, **PLAIN_SGD, **settings}
    trainer = make_trainer(folder, copy.deepcopy(student), teacher, rows, **settings)
    trainer.train()
    return trainer


@pytest.fixture
def forwards():
    """Counts the forwards of a module."""
    counts = {}

    def count(module):
        module.register_forward_pre_hook(lambda *_: counts.update({id(module): counts.get(id(module), 0) + 1}))
        return lambda: counts.get(id(module), 0)

    return count


@pytest.mark.parametrize("stones", ["none", "all", "share"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training_is_the_same_with_a_cache(tmp_path, case, stones):
    build, config, make_rows, settings = case
    teacher, student, rows = build(**config), build(num_hidden_layers=2, **config), make_rows(10)
    settings = {"stepping_stones": stones, **settings}
    live = run(tmp_path / "live", student, teacher, rows, **settings)
    cached = run(tmp_path / "cached", student, teacher, rows, teacher_cache=str(tmp_path / "cache"), **settings)
    lossless = "teacher_cache_top_k" not in settings
    assert max_difference(state_of(cached.model), state_of(live.model)) < (1e-5 if lossless else 2e-3)
    for ours, theirs in zip(step_logs(cached), step_logs(live), strict=True):
        assert ours["loss_distill"] == pytest.approx(theirs["loss_distill"], rel=1e-4 if lossless else 1e-2, abs=1e-6)
    tensors = [load_file(path) for path in (tmp_path / "cache").glob("*.safetensors")]
    assert sum(len(one["keys"]) for one in tensors) == 10


def test_the_clean_pass_is_spared(tmp_path, forwards):
    teacher, rows = tiny_vit(), image_rows(8)
    count = forwards(teacher)
    settings = {"stepping_stones": "none", "teacher_cache": str(tmp_path / "cache"), "num_train_epochs": 3}
    run(tmp_path / "first", tiny_vit(num_hidden_layers=2), teacher, rows, **settings)
    filling = 2
    # One for the shapes of its states, five of which four skip all layers for their layout, and two that tell what the
    # head reads; in the self-test, two clean passes, one for each of two entry depths, and one that skips all layers.
    test = 1 + 5 + 2 + 2 + 2 + 1
    assert count() == filling + test
    run(tmp_path / "second", tiny_vit(num_hidden_layers=2), teacher, rows, **settings)
    assert count() == filling + 2 * test


def test_a_cache_survives_a_resume_with_the_same_bits(tmp_path):
    teacher, student, rows = tiny_vit(), tiny_vit(num_hidden_layers=2), image_rows(8)
    settings = {"teacher_cache": str(tmp_path / "cache"), "stepping_stones": "share", "save_strategy": "epoch"}
    whole = run(tmp_path / "run", student, teacher, rows, **settings)
    again = make_trainer(
        tmp_path / "run",
        copy.deepcopy(student),
        teacher,
        rows,
        num_train_epochs=2,
        temperature=2.0,
        **PLAIN_SGD,
        **settings,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert max_difference(state_of(again.model), state_of(whole.model)) == 0.0


def test_new_examples_are_added_and_known_ones_are_not_computed_again(tmp_path):
    teacher, student = tiny_vit(), tiny_vit(num_hidden_layers=2)
    folder = tmp_path / "cache"
    run(tmp_path / "run", student, teacher, image_rows(4), teacher_cache=str(folder))
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    run(tmp_path / "run", student, teacher, image_rows(6), teacher_cache=str(folder))
    second = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: second[name] for name in first} == first
    (added,) = set(second) - set(first)
    assert len(load_file(folder / added)["keys"]) == 2


def test_a_cache_of_another_teacher_temperature_or_k_is_refused_and_left_alone(tmp_path):
    student, teacher = tiny_llama(num_hidden_layers=2), tiny_llama()
    folder, rows = tmp_path / "cache", token_rows(4)
    run(tmp_path / "run", student, teacher, rows, teacher_cache=str(folder), teacher_cache_top_k=3)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    trained = copy.deepcopy(teacher)
    with torch.no_grad():
        trained.model.layers[0].mlp.down_proj.weight[0, 0] += 1e-3
    for changed, settings, named in (
        (trained, {"teacher_cache_top_k": 3}, "teacher"),
        (teacher, {"teacher_cache_top_k": 4}, "top_k 3, but this run has 4"),
        (teacher, {"teacher_cache_top_k": 3, "temperature": 1.0}, "temperature 2.0, but this run has 1.0"),
    ):
        with pytest.raises(ValueError, match=f"`teacher_cache` .*was filled with {named}.*delete the folder"):
            run(tmp_path / "run", student, changed, rows, teacher_cache=str(folder), **settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert json.loads((folder / DESCRIPTION).read_text())["top_k"] == 3


def test_data_that_changes_from_epoch_to_epoch_is_refused_before_an_update(tmp_path):
    words = {"<pad>": 0, "<mask>": 1, "</s>": 2, **{str(i): i for i in range(3, 60)}}
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", mask_token="<mask>"
    )
    student = bert("MaskedLM", num_hidden_layers=2)
    rows = [{"input_ids": row["input_ids"]} for row in token_rows(8)]
    trainer = make_trainer(tmp_path, student, bert("MaskedLM"), rows, teacher_cache=str(tmp_path / "cache"))
    trainer.data_collator = DataCollatorForLanguageModeling(tokenizer)
    before = state_of(student)
    with pytest.raises(ValueError, match=r"not in `teacher_cache` .*changes from epoch to epoch"):
        trainer.train()
    assert max_difference(state_of(student), before) == 0.0


@pytest.mark.parametrize(
    ("build", "rows", "settings", "message"),
    [
        (partial(bert, "QuestionAnswering"), text_rows, {}, "BertForQuestionAnswering has 2 heads"),
        (tiny_llama, token_rows, {"divergence": "dkd"}, "likeliest tokens only, but divergence='dkd'"),
        (tiny_llama, token_rows, {"standardize_logits": True}, "likeliest tokens only, but standardize_logits=True"),
        (tiny_vit, lambda: iter(image_rows()), {"max_steps": 1}, "the training set has no length"),
        (tiny_llama, token_rows, {"teacher_cache_top_k": 0}, "`teacher_cache_top_k` must be at least 1"),
    ],
)
def test_what_cannot_be_cached_is_refused(tmp_path, build, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, build(), build(), rows(), teacher_cache=str(tmp_path / "cache"), **settings)


@pytest.mark.parametrize(("build", "rows"), [(tiny_t5, token_rows)])
def test_stones_that_need_more_of_the_clean_pass_than_its_outputs_are_refused(tmp_path, build, rows):
    trainer = make_trainer(tmp_path, build(), build(), rows(), teacher_cache=str(tmp_path / "cache"), max_steps=1)
    with pytest.raises(ValueError, match="hand on more than hidden states"):
        trainer.train()
    settings = {"teacher_cache": str(tmp_path / "cache"), "stepping_stones": "none", "max_steps": 1}
    make_trainer(tmp_path, build(), build(), rows(), **{**settings, "teacher_cache": str(tmp_path / "other")}).train()


def test_layers_that_work_between_each_other_are_cached_nonetheless(tmp_path):
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student, teacher = tiny_deberta(num_hidden_layers=2, **dropout), tiny_deberta(**dropout)
    live = run(tmp_path / "live", student, teacher, text_rows())
    cached = run(tmp_path / "cached", student, teacher, text_rows(), teacher_cache=str(tmp_path / "cache"))
    assert max_difference(state_of(cached.model), state_of(live.model)) < 1e-5


def test_the_last_short_batch_is_kept_where_training_drops_it(tmp_path):
    settings = {"dataloader_drop_last": True, "teacher_cache": str(tmp_path / "cache"), "num_train_epochs": 3}
    trainer = run(tmp_path, tiny_vit(num_hidden_layers=2), tiny_vit(), image_rows(10), **settings)
    assert trainer.state.global_step == 6
    assert trainer.args.dataloader_drop_last


def test_a_second_run_on_other_data_fills_the_cache_with_it(tmp_path):
    settings = {"teacher_cache": str(tmp_path / "cache")}
    trainer = run(tmp_path, tiny_vit(num_hidden_layers=2), tiny_vit(), image_rows(4), **settings)
    trainer.train_dataset = image_rows(6, seed=1)
    trainer.train()
    assert sum(len(load_file(path)["keys"]) for path in (tmp_path / "cache").glob("*.safetensors")) == 10


def test_a_folder_of_the_first_versions_which_used_another_hash_is_refused(tmp_path):
    teacher = tiny_vit()
    TeacherCache(tmp_path, teacher, num_classes=5)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    del description["keys"]
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(ValueError, match="was filled with keys blake2b, but this run has xxh3_64; delete the folder"):
        TeacherCache(tmp_path, teacher, num_classes=5)


def test_rows_of_another_number_are_not_taken(tmp_path):
    teacher = tiny_vit()
    cache = TeacherCache(tmp_path, teacher, num_classes=5)
    cache.add([7, 8], [1, 2], torch.arange(15.0).view(3, 5))
    cache.write()
    again = TeacherCache(tmp_path, teacher, num_classes=5)
    assert torch.equal(again.rows([8, 7], [2, 1]), torch.arange(15.0).view(3, 5)[[1, 2, 0]])
    with pytest.raises(ValueError, match=r"Examples \[1\] of a batch are not in"):
        again.rows([8, 7], [2, 2])


# ---- Interrupted, in parts, torn ----


def filler(folder, teacher, rows, **settings):
    """A trainer that has not filled its cache yet."""
    settings = {"objective": "kd", "teacher_cache": str(folder), **settings}
    return make_trainer(folder.parent / "run", tiny_vit(num_hidden_layers=2), teacher, rows, **settings)


def kept(folder):
    """The rows of every example in a folder."""
    keys = [key for path in folder.glob("*.safetensors") for key in load_file(path)["keys"].tolist()]
    assert len(keys) == len(set(keys))
    return {key: MappedRows(folder).take([key])["logits"].tolist() for key in keys}


def test_filling_goes_on_where_it_was_interrupted(tmp_path, forwards):
    teacher, rows = tiny_vit(), image_rows(16)
    filler(tmp_path / "whole", teacher, rows).fill_teacher_cache()
    begun, goes_on = (filler(tmp_path / "cache", teacher, rows) for _ in range(2))
    count = forwards(teacher)

    def interrupt(*_):
        if count() == 3:
            raise KeyboardInterrupt

    hook = teacher.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        begun.fill_teacher_cache()
    hook.remove()
    assert len(kept(tmp_path / "cache")) == 8
    goes_on.fill_teacher_cache()
    assert count() == 3 + 2
    assert kept(tmp_path / "cache") == kept(tmp_path / "whole")


def test_parts_that_were_filled_apart_make_one_cache(tmp_path, forwards):
    teacher, rows = tiny_vit(), image_rows(16)
    filler(tmp_path / "whole", teacher, rows).fill_teacher_cache()
    filler(tmp_path / "cache", teacher, rows[:8]).fill_teacher_cache()
    filler(tmp_path / "other", teacher, rows[8:]).fill_teacher_cache()
    for path in (tmp_path / "other").glob("*.safetensors"):
        path.rename(tmp_path / "cache" / path.name)
    whole = filler(tmp_path / "cache", teacher, rows)
    count = forwards(teacher)
    whole.fill_teacher_cache()
    assert count() == 0
    assert kept(tmp_path / "cache") == kept(tmp_path / "whole")


# ---- Data sets that know what they are made of ----


def table(rows):
    columns = {"pixel_values": [row["pixel_values"].tolist() for row in rows]}
    return datasets.Dataset.from_dict({**columns, "labels": [row["labels"].item() for row in rows]})


def as_tensors(rows):
    return {name: [torch.tensor(value) for value in column] for name, column in rows.items()}


def brighter(rows):
    rows = as_tensors(rows)
    return {**rows, "pixel_values": [2 * image for image in rows["pixel_values"]]}


def noisy(rows):
    rows = as_tensors(rows)
    return {**rows, "pixel_values": [image + torch.randn(()) for image in rows["pixel_values"]]}


def shifted_by_a_file(rows, path):
    shift = float(Path(path).read_text())
    rows = as_tensors(rows)
    return {**rows, "pixel_values": [image + shift for image in rows["pixel_values"]]}


@pytest.fixture
def batches(monkeypatch):
    """Counts the batches that got keys."""
    made = []
    usual = KeyedCollator.__call__
    monkeypatch.setattr(KeyedCollator, "__call__", lambda self, rows: made.append(1) or usual(self, rows))
    return made


@pytest.mark.parametrize("transform", [None, brighter])
def test_data_that_was_gone_through_once_is_not_gone_through_again(tmp_path, batches, transform):
    teacher, student, rows = tiny_vit(), tiny_vit(num_hidden_layers=2), image_rows(8)

    def data(some=rows, transform=transform):
        return table(some).with_transform(transform) if transform else table(some).with_format("torch")

    folder, settings = tmp_path / "cache", {"teacher_cache": str(tmp_path / "cache"), "objective": "kd"}
    live = run(tmp_path / "run", student, teacher, data(), objective="kd")
    first = run(tmp_path / "run", student, teacher, data(), **settings)
    assert len(batches) == 2 + 4
    second = run(tmp_path / "run", student, teacher, data(), **settings)
    assert len(batches) == 2 + 4 + 4
    assert max_difference(state_of(second.model), state_of(first.model)) == 0.0
    assert max_difference(state_of(second.model), state_of(live.model)) < 1e-5
    # Other rows, another transform, another collator, and data that cannot tell.
    others = [data(image_rows(8, seed=1)), data(transform=as_tensors), data(), rows]
    for position, other in enumerate(others):
        trainer = filler(folder, teacher, other)
        if position == 2:
            trainer.data_collator = partial(trainer.data_collator, return_tensors="pt")
        before = len(batches)
        trainer.fill_teacher_cache()
        assert len(batches) == before + 2, position


def test_data_is_gone_through_again_where_a_file_of_the_cache_is_torn(tmp_path, forwards):
    teacher, data = tiny_vit(), table(image_rows(8)).with_format("torch")
    filler(tmp_path / "cache", teacher, data).fill_teacher_cache()
    before = file_bytes(tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    again = filler(tmp_path / "cache", teacher, data)
    count = forwards(teacher)
    again.fill_teacher_cache()
    assert count() == 2
    assert file_bytes(tmp_path / "cache") == before


def test_a_random_transform_is_refused_every_time(tmp_path):
    teacher, data = tiny_vit(), table(image_rows(8)).with_transform(noisy)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"not in `teacher_cache` .*changes from epoch to epoch"):
            filler(tmp_path / "cache", teacher, data).train()


def test_content_that_changed_behind_a_data_set_is_noticed_and_computed_at_the_next_start(tmp_path):
    teacher, source = tiny_vit(), tmp_path / "shift"
    data = table(image_rows(8)).with_transform(partial(shifted_by_a_file, path=str(source)))
    source.write_text("0.5")
    filler(tmp_path / "cache", teacher, data).train()
    source.write_text("1.5")
    with pytest.raises(ValueError, match="has changed since it was filled; start again"):
        filler(tmp_path / "cache", teacher, data).train()
    filler(tmp_path / "cache", teacher, data).train()
    assert len(kept(tmp_path / "cache")) == 16


# ---- Keys ----


def test_a_key_follows_from_the_tokens_and_labels_not_from_the_padding():
    tokens = torch.tensor([[5, 6, 7, 0], [8, 9, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    labels = torch.tensor([1, 2])

    def keys(**changed):
        batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels, **changed}
        return example_keys(batch, len(batch["labels"]))

    first = keys()
    cut = {"input_ids": tokens[:1, :3], "attention_mask": mask[:1, :3], "labels": labels[:1]}
    assert keys(**cut) == first[:1]
    # Padding on the left moves positions, and makes a row of the first token.
    left = {"input_ids": tokens[:1].roll(1, -1), "attention_mask": mask[:1].roll(1, -1), "labels": labels[:1]}
    assert keys(**left) != first[:1]
    other = tokens.clone()
    other[0, 3] = 9  # under the padding
    assert keys(input_ids=other) == first
    other[0, 2] = 9
    assert keys(input_ids=other)[0] != first[0]
    assert keys(labels=torch.tensor([0, 2]))[0] != first[0]
    assert keys(attention_mask=torch.ones_like(mask))[0] != first[0]
    assert first[0] != first[1]


def test_a_key_follows_from_the_labels_up_to_the_last_and_from_decoder_inputs_as_far():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
        "labels": torch.tensor([[4, 3, -100]]),
        "decoder_input_ids": torch.tensor([[0, 4, 3]]),
    }
    first = example_keys(batch, 1)
    longer = {
        **batch,
        "labels": torch.tensor([[4, 3, -100, -100]]),
        "decoder_input_ids": torch.tensor([[0, 4, 3, 0]]),
    }
    assert example_keys(longer, 1) == first
    # As long as the text, whose mask says nothing of labels.
    padded = {**batch, "attention_mask": torch.tensor([[1, 0, 0]])}
    assert example_keys({**padded, "labels": torch.tensor([[4, 3, 2]])}, 1) != example_keys(padded, 1)
    classes = {**padded, "labels": torch.tensor([[1.0, 0.0, 0.0]])}
    assert example_keys({**classes, "labels": torch.tensor([[1.0, 0.0, 1.0]])}, 1) != example_keys(classes, 1)


def test_a_batch_whose_examples_cannot_be_told_apart_is_refused():
    patches = {"input_ids": torch.ones(2, 3), "pixel_values": torch.ones(7, 4)}
    with pytest.raises(
        ValueError, match=r"`teacher_cache` tells the 2 examples .*`pixel_values` has the shape \(7, 4\)"
    ):
        example_keys(patches, 2)


# ---- The likeliest classes ----


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_kept_classes_and_the_rest_make_a_distribution_that_bounds_the_divergence_from_below(temperature):
    logits, target = torch.randn(6, 20) * 3, torch.randn(6, 20) * 3
    whole = F.kl_div((logits / temperature).log_softmax(-1), (target / temperature).softmax(-1), reduction="none").sum(
        -1
    )
    previous = torch.zeros(6)
    for k in (1, 4, 10, 19):
        kept = top_k(target, k, temperature, num_classes=20)
        learner = kept.bucket(logits, temperature)
        probabilities = (target / temperature).softmax(-1)
        order = probabilities.argsort(-1, descending=True)[:, :k]
        expected = probabilities.gather(-1, order)
        torch.testing.assert_close(kept.log_probs.exp()[:, :k], expected)
        torch.testing.assert_close(kept.log_probs.exp().sum(-1), torch.ones(6))
        torch.testing.assert_close(learner.exp().sum(-1), torch.ones(6))
        found = (kept.log_probs.exp() * (kept.log_probs - learner)).sum(-1)
        assert (found <= whole + 1e-5).all()
        assert (found >= previous - 1e-5).all()
        previous = found
    torch.testing.assert_close(previous, whole)


def test_padding_rows_of_a_vocabulary_take_no_part():
    logits, target = torch.randn(3, 12), torch.randn(3, 10)
    kept = top_k(torch.cat([target, torch.full((3, 2), 50.0)], -1), 4, 1.0, num_classes=10)
    torch.testing.assert_close(kept.log_probs, top_k(target, 4, 1.0, 10).log_probs)
    torch.testing.assert_close(kept.bucket(logits, 1.0), kept.bucket(logits[:, :10], 1.0))
