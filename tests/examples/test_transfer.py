"""What students train on besides labelled rows."""

from types import SimpleNamespace

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transfer import transfer_rows

FEATURES = Features(text=Value("string"), label=ClassLabel(names=["bad", "good"]))


def rows(count=10):
    return Dataset.from_dict(
        {"text": [f"t{i}" for i in range(count)], "label": [i % 2 for i in range(count)]}, FEATURES
    )


def test_all_labels_stay_by_default():
    assert transfer_rows(rows(), None, SimpleNamespace(label_share=1.0)).to_list() == rows().to_list()


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_share_of_the_rows_keeps_its_labels_and_the_others_stay_without(share):
    found = transfer_rows(rows(), None, SimpleNamespace(label_share=share, split_seed=0))
    labels = {row["text"]: row["label"] for row in found}
    assert sorted(labels) == sorted(rows()["text"])
    kept = {text: label for text, label in labels.items() if label is not None}
    assert len(kept) == 10 * share
    assert kept.items() <= {row["text"]: row["label"] for row in rows()}.items()
    assert found.features == FEATURES


def test_rows_without_labels_come_along():
    extra = Dataset.from_dict({"text": ["a", "b"]})
    found = transfer_rows(rows(3), extra, SimpleNamespace(label_share=1.0))
    assert found.to_list() == [*rows(3).to_list(), {"text": "a", "label": None}, {"text": "b", "label": None}]
