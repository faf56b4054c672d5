"""Fitting connectors takes nothing of a stream away from the run."""

import pickle
import random

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_blockkd.data.streams import ReadAhead

from ..helpers.tiny_models import tiny_bert
from ..helpers.training import make_trainer, text_rows


class Stream(IterableDataset):
    """Rows that can be read as often as one likes, or once; it notes every row that a batch is made of."""

    def __init__(self, rows, once):
        self.rows = iter(rows) if once else rows

    def __iter__(self):
        yield from self.rows


class Note:
    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append([row["number"] for row in rows])
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "number"}


def numbered(count):
    return [{**row, "number": number} for number, row in enumerate(text_rows(count))]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("once", [False, True])
def test_worker_processes_begin_where_they_would_without_a_look_ahead(workers, once):
    """A generator over what an object holds begins anew or goes on: that cannot be told from the generator."""
    numbers = range(400)
    ahead = ReadAhead(Stream(numbers, once), 256, workers)
    plain, looked = (
        [batch.tolist() for batch in DataLoader(stream, batch_size=8, num_workers=workers)]
        for stream in (Stream(numbers, once), ahead)
    )
    assert looked == plain
    assert ahead.rows == list(range(256))


def test_rows_of_many_tensors_come_from_a_worker_process():
    rows = [{name: torch.full((2,), number) for name in "abcdefgh"} for number in range(256)]
    found = ReadAhead(Stream(rows, once=True), 256, 2).rows
    assert all(torch.equal(row[name], one[name]) for row, one in zip(rows, found, strict=True) for name in row)


@pytest.mark.parametrize("once", [False, True])
def test_every_row_of_a_stream_trains(tmp_path, once):
    stream, note = Stream(numbered(320), once), Note()
    trainer = make_trainer(
        tmp_path, tiny_bert(num_hidden_layers=2), tiny_bert(), stream, max_steps=80, remove_unused_columns=False
    )
    trainer.data_collator = note
    trainer.train()
    assert trainer.state.global_step == 80
    assert trainer.pair.fitted_stones
    trained = [number for batch in note.batches if len(batch) == 4 for number in batch]
    assert trained == list(range(320))
    assert trainer.train_dataset is stream


def test_a_second_pass_begins_anew():
    ahead = ReadAhead([1, 2, 3], 2)
    assert [list(ahead), list(ahead)] == [[1, 2, 3]] * 2


def test_a_short_stream_is_read_to_its_end():
    assert ReadAhead(iter([1]), 2).rows == [1]


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_lose_nothing(workers):
    ahead = ReadAhead([1, 2, 3], 2, workers)
    assert ahead.rows == [1, 2]
    loader = DataLoader(ahead, batch_size=None, num_workers=workers)
    assert sorted(loader) == sorted([1, 2, 3] * workers)
    assert pickle.loads(pickle.dumps(ahead)).rows == []


@pytest.mark.parametrize(("epoch", "rows"), [(0, [0, 1, 2, 3]), (3, [30, 31, 32, 33])])
def test_the_rows_of_the_epoch_that_a_run_begins_with_are_its_first(epoch, rows):
    class Shuffled(Counted):
        def set_epoch(self, epoch):
            self.epoch = epoch

    ahead = ReadAhead(Shuffled(), 2)
    ahead.set_epoch(epoch)
    assert list(ahead) == rows
    once = ReadAhead(iter(range(4)), 2)  # of which no epoch is said
    once.set_epoch(epoch)
    assert list(once) == [0, 1, 2, 3]


def test_what_else_the_stream_has_is_found():
    stream = Stream([], once=False)
    stream.shuffle = random.seed
    assert ReadAhead(stream, 2).shuffle is random.seed
    with pytest.raises(AttributeError):
        ReadAhead(stream, 2).nothing_of_the_kind  # noqa: B018


class Counted(IterableDataset):
    """Numbers of an epoch."""

    epoch = 0

    def __iter__(self):
        return iter([10 * self.epoch + number for number in range(4)])


def test_worker_processes_of_a_later_pass_begin_anew():
    stream = Counted()
    ahead = ReadAhead(stream, 2)
    loader = DataLoader(ahead, batch_size=None, num_workers=1)
    assert list(loader) == [0, 1, 2, 3]
    stream.epoch = 1
    assert list(loader) == [10, 11, 12, 13]


def test_several_workers_go_on_with_the_one_iterator_of_a_stream():
    ahead = ReadAhead(iter([1, 2, 3]), 2, 2)
    assert ahead.rows == [1, 2]
    assert sorted(DataLoader(ahead, batch_size=None, num_workers=2)) == [1, 1, 2, 2, 3, 3]


class SharedOut(IterableDataset):
    """Rows that worker processes share out, from where the stream stands."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        worker = get_worker_info()
        place, share = (0, 1) if worker is None else (worker.id, worker.num_workers)
        yield from (row for row in self.rows if row["number"] % share == place)


def test_a_stream_that_several_workers_share_out_trains_whole(tmp_path):
    seen = []
    settings = {"max_steps": 80, "dataloader_num_workers": 2, "remove_unused_columns": False}
    models, stream = (tiny_bert(num_hidden_layers=2), tiny_bert()), SharedOut(numbered(320))
    trainer = make_trainer(tmp_path, *models, stream, **settings)
    trainer.data_collator = lambda rows: {
        name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]
    }
    inner = trainer.pair.complete

    def complete(inputs):
        seen.append(inputs.pop("number").tolist())
        return inner(inputs)

    trainer.pair.complete = complete
    trainer.train()
    assert trainer.pair.fitted_stones
    trained = [number for batch in seen if len(batch) == 4 for number in batch]
    assert sorted(trained) == list(range(320))
