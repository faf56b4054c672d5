"""Models without heads are distilled by their vectors, without any label."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModel,
    BertTokenizerFast,
    DataCollatorWithPadding,
    default_data_collator,
)

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer, make_student
from hf_blockkd.losses.embeddings import embedding_loss
from hf_blockkd.metrics import SimilarityCorrelation
from hf_blockkd.models.loading import load_model
from hf_blockkd.models.pooling import Pooling

from ..helpers.tiny_models import VOCABULARY, scrambled, tiny_bert, tiny_distilbert, tiny_vit
from ..helpers.training import (
    PLAIN_SGD,
    QUIET,
    assert_same_state,
    image_rows,
    make_trainer,
    max_difference,
    state_of,
    step_logs,
    text_rows,
    with_connectors,
)


def sentences(count=16, seed=0):
    return [{name: row[name] for name in ("input_ids", "attention_mask")} for row in text_rows(count, seed=seed)]


def student_of(teacher, **fields):
    return scrambled(type(teacher)(copy.deepcopy(teacher.config).__class__(**{**teacher.config.to_dict(), **fields})))


def shallow(teacher):
    return student_of(teacher, num_hidden_layers=2).eval()


@pytest.fixture
def folder(tmp_path):
    """A teacher as sentence-transformers keeps it, with a tokenizer of letters."""
    folder = tmp_path / "teacher"
    tiny_bert(None).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + i) for i in range(26))]
    words += [f"[unused{i}]" for i in range(VOCABULARY - len(words))]
    BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    settings = {"sentence_bert_config.json": json.dumps({"max_seq_length": 12})}
    Pooling(("cls",), normalize=True, settings=settings).save(folder, 16)
    return folder


SETTINGS = {
    "default": {},
    "plain": {"objective": "kd", "embedding_loss": "squared_error"},
    "all": {"stepping_stones": "all", "cross_weight": 0.5, "embedding_loss": "cosine+similarity"},
    "share": {"stepping_stones": "share", "pooling": "max"},
    "fcfd": {"objective": "fcfd", "pooling": "cls"},
    "simkd": {"objective": "simkd"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_student_comes_nearer_to_its_teacher(tmp_path, settings):
    teacher = tiny_bert(None)
    rows = sentences(64)
    trainer = make_trainer(
        tmp_path,
        shallow(teacher),
        teacher,
        rows,
        eval_dataset=rows,
        max_steps=40,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        **settings,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    assert all(entry["loss_task"] == 0.0 for entry in step_logs(trainer))


def test_states_weigh_half_of_what_they_differ_by(tmp_path):
    teacher = tiny_bert(None)
    trainer = make_trainer(tmp_path, shallow(teacher), teacher, sentences(256), max_steps=1)
    trainer.train()
    (logs,) = step_logs(trainer)
    assert logs["loss_state"] > 0
    assert logs["loss"] == pytest.approx(logs["loss_distill"] + 0.5 * logs["loss_state"], rel=1e-5)
    assert trainer.objective.resolved(trainer.pair)["state_weight"] == 0.5


def test_labels_are_not_looked_at(tmp_path):
    teacher = tiny_bert(None)
    student = shallow(teacher)
    states = []
    for rows in (sentences(8), text_rows(8)):
        trainer = make_trainer(tmp_path, copy.deepcopy(student), teacher, rows, max_steps=2, **PLAIN_SGD)
        trainer.train()
        states.append(state_of(trainer.model))
    assert_same_state(*states)


def test_an_evaluation_compares_students_and_stones_with_the_teacher(tmp_path):
    teacher = tiny_bert(None)
    teacher.pooling = Pooling(("mean",), normalize=True)
    student = scrambled(student_of(teacher, hidden_size=8, num_hidden_layers=2)).eval()
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"width": prediction.predictions.shape[1]}

    rows = sentences(6)
    trainer = make_trainer(
        tmp_path, student, teacher, rows, eval_dataset=rows, compute_metrics=compute_metrics, eval_stepping_stones=True
    )
    metrics = trainer.evaluate()
    assert (metrics["eval_width"], metrics["eval_stone_1_width"], metrics["eval_teacher_width"]) == (8, 16, 16)
    assert metrics["eval_teacher_loss"] == pytest.approx(0.0, abs=1e-6)
    assert all(np.allclose(np.linalg.norm(one.predictions, axis=1), 1.0, atol=1e-6) for one in seen)
    batch = default_data_collator(rows)
    with torch.no_grad():
        outputs = student(**batch), teacher(**batch)
    mask = batch["attention_mask"]
    ours, theirs = (Pooling(normalize=True)(one.last_hidden_state, mask) for one in outputs)
    assert np.allclose(seen[0].predictions, ours, atol=1e-6)
    assert np.allclose(seen[0].label_ids, theirs, atol=1e-6)
    connected = torch.nn.functional.normalize(
        trainer.pair.embeddings.connector(Pooling().pool(outputs[0].last_hidden_state, mask)), dim=1
    )
    assert metrics["eval_loss"] == pytest.approx(embedding_loss(connected, theirs).mean().item(), rel=1e-5)
    stones = trainer.stepping_stone_logits(batch)
    assert {index: tuple(stone.shape) for index, stone in stones.items()} == {1: (6, 16), 2: (6, 16)}


def test_a_run_goes_on_to_the_same_bits_with_the_connector_of_the_vectors(tmp_path):
    teacher = tiny_bert(None)
    student = student_of(teacher, hidden_size=8, num_hidden_layers=2)

    def trainer():
        torch.manual_seed(0)
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        return make_trainer(tmp_path, copy.deepcopy(student), teacher, sentences(16), **settings)

    unbroken, resumed = trainer(), trainer()
    begun = unbroken.pair.embeddings.connector.weight.clone()
    unbroken.train()
    assert not torch.equal(unbroken.pair.embeddings.connector.weight, begun)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with with_connectors(unbroken), with_connectors(resumed):
        assert_same_state(state_of(resumed.model), state_of(unbroken.model))


def test_kept_vectors_teach_as_the_teacher_does_and_are_those_of_one_pooling(tmp_path):
    teacher = tiny_bert(None)
    student = shallow(teacher)
    cache = {"teacher_cache": str(tmp_path / "cache")}
    states = []
    for settings in ({}, cache):
        own = {"objective": "kd", "max_steps": 2, **PLAIN_SGD, **settings}
        trainer = make_trainer(tmp_path / "run", copy.deepcopy(student), teacher, sentences(8), **own)
        trainer.train()
        states.append(state_of(trainer.model))
    assert max_difference(*states) < 1e-6
    own = {"objective": "kd", "max_steps": 2, "pooling": "max", **cache}
    with pytest.raises(ValueError, match="was filled with pooling mean, but this run has max"):
        make_trainer(tmp_path / "run", student, teacher, sentences(8), **own).train()


def test_vectors_that_are_compared_with_nothing_are_refused(tmp_path):
    teacher = tiny_bert(None)
    settings = {"embedding_loss": "similarity", "per_device_train_batch_size": 1}
    with pytest.raises(ValueError, match="`per_device_train_batch_size` is 1; make it at least 2, or choose 'cosine'"):
        make_trainer(tmp_path, shallow(teacher), teacher, sentences(), **settings)
    make_trainer(tmp_path, shallow(teacher), teacher, sentences(), **settings | {"embedding_loss": "cosine+similarity"})
    trainer = make_trainer(tmp_path, shallow(teacher), teacher, sentences(), distill_weight=0.0, max_steps=1)
    with pytest.raises(ValueError, match=r"`distill_weight` and `state_weight` .* are 0, .* BertModel has no head"):
        trainer.train()
    trainer.args.state_weight = 1.0
    trainer.train()


@pytest.mark.parametrize("objective", ["alone", "theseus"])
def test_an_objective_of_labels_alone_is_refused(tmp_path, objective):
    with pytest.raises(ValueError, match=f"`objective` is '{objective}', which trains on labels alone, but BertModel"):
        make_trainer(tmp_path, shallow(tiny_bert(None)), tiny_bert(None), sentences(), objective=objective)


@pytest.mark.parametrize(("field", "value"), [("embedding_loss", "euclid"), ("pooling", "middle")])
def test_unknown_words_are_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}` is '{value}'"):
        BlockwiseDistillConfig("out", **{field: value})


def test_images_are_distilled_likewise(tmp_path):
    rows = [{"pixel_values": row["pixel_values"]} for row in image_rows(16)]
    teacher = tiny_vit(None)
    trainer = make_trainer(tmp_path, student_of(teacher, hidden_size=8), teacher, rows, max_steps=2, pooling="cls")
    trainer.train()
    trainer.save_model()
    _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not (tmp_path / "modules.json").exists()  # which is for texts


def test_families_meet(tmp_path):
    teacher = tiny_bert(None)
    student = scrambled(AutoModel.from_config(tiny_distilbert().config))
    make_trainer(tmp_path, student, teacher, sentences(8), max_steps=1).train()


def trained_from(folder, out, **cut):
    """A student that is cut out of a folder of sentence-transformers, trained and saved."""
    teacher, tokenizer = load_model(str(folder)), BertTokenizerFast.from_pretrained(folder)
    texts = Dataset.from_dict({"text": [" ".join("abcdefg"[i % 5 : 3 + i % 7]) or "h" for i in range(32)]})
    rows = texts.map(lambda row: tokenizer(row["text"]), remove_columns="text")
    collate = DataCollatorWithPadding(tokenizer)
    trainer = BlockwiseDistillTrainer(
        model=make_student(str(folder), num_layers=2, data=rows, data_collator=collate, **cut),
        teacher_model=str(folder),
        args=BlockwiseDistillConfig(str(out), **QUIET, max_steps=2),
        train_dataset=rows,
        data_collator=collate,
        processing_class=tokenizer,
    )
    assert trainer.pair.embeddings.poolings["teacher"] == teacher.pooling == Pooling(("cls",), normalize=True)
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.mark.parametrize("cut", [{}, {"hidden_size": 8}], ids=["same-width", "narrower"])
def test_a_folder_of_sentence_transformers_teaches_and_one_comes_out(tmp_path, folder, cut):
    out = tmp_path / "student"
    trainer = trained_from(folder, out, **cut)
    model, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_state(state_of(model), state_of(trainer.model))
    assert load_model(str(out)).pooling == load_model(str(folder)).pooling
    assert json.loads((out / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == 16 - 8 * bool(cut)
    assert (out / "sentence_bert_config.json").read_text() == (folder / "sentence_bert_config.json").read_text()
    # It is a student to go on with, and a teacher.
    assert load_model(str(out)).cut == trainer.model.cut


@pytest.mark.slow
@pytest.mark.parametrize("cut", [{}, {"hidden_size": 8}], ids=["same-width", "narrower"])
def test_what_comes_out_encodes_in_the_library_as_it_was_evaluated(tmp_path, folder, cut):
    library = pytest.importorskip("sentence_transformers", reason="needs `pip install sentence-transformers`")
    trainer = trained_from(folder, tmp_path / "student", **cut)
    found = library.SentenceTransformer(str(tmp_path / "student"), device="cpu")
    assert found.max_seq_length == 12
    texts = ["a b c", "d e", "f g a b"]
    batch = trainer.processing_class(texts, padding=True, return_tensors="pt")
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(3)]
    ours = trainer.predict(Dataset.from_list([{n: t.tolist() for n, t in row.items()} for row in rows])).predictions
    assert np.allclose(found.encode(texts), ours, atol=1e-6)


def test_the_correlation_of_similarities_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(size=(9, 3)), generator.normal(size=(9, 5))
    theirs[1] = theirs[0]  # equal similarities

    def similarities(vectors):
        vectors = vectors.astype(np.float32) / np.linalg.norm(vectors, axis=1, keepdims=True)
        return [float(vectors[i] @ vectors[j]) for i in range(9) for j in range(i + 1, 9)]

    expected = stats.spearmanr(similarities(ours), similarities(theirs)).statistic
    found = SimilarityCorrelation().compute(predictions=ours, references=theirs)["spearman"]
    assert found == pytest.approx(expected, abs=1e-3)
