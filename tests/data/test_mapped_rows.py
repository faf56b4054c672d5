"""Rows by key in files: mapped and not read, written by several, and never torn."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_blockkd.data import mapped_rows
from hf_blockkd.data.mapped_rows import MappedRows


def anonymous_bytes() -> int:
    """Memory of this process that no file stands for."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def fill(folder, keys, width=3, counts=None):
    """Row r of key k holds k + r / 10."""
    rows = MappedRows(folder)
    counts = [1] * len(keys) if counts is None else counts
    values = [key + row / 10 for key, count in zip(keys, counts, strict=True) for row in range(count)]
    rows.add(keys, counts, {"logits": torch.tensor(values, dtype=torch.float64)[:, None].expand(-1, width)})
    rows.write()
    return rows


def fill_in_turn(folder, part, barrier):
    for first in range(0, 40, 10):
        barrier.wait()
        # The parts overlap, as those of ranks do where the last batch is filled up from the beginning.
        fill(folder, [100 * part + first + i for i in range(10)] + [1000 + first])


def test_rows_come_back_by_key_in_any_order_whatever_their_number(tmp_path):
    generator = np.random.default_rng(0)
    keys = generator.integers(-(2**63), 2**63, 50).tolist()
    counts = generator.integers(0, 4, 50).tolist()
    expected = {key: [key + row / 10 for row in range(count)] for key, count in zip(keys, counts, strict=True)}
    for start in (0, 20, 40):
        fill(tmp_path, keys[start : start + 20], counts=counts[start : start + 20])
    rows = MappedRows(tmp_path)
    assert len(rows) == 50
    assert len(rows.shards) == 3
    for _ in range(5):
        some = generator.permutation(keys)[:17].tolist()
        assert rows.counts(some) == [len(expected[key]) for key in some]
        found = rows.take(some)["logits"]
        assert found[:, 0].tolist() == [value for key in some for value in expected[key]]
    assert 7 not in rows
    assert rows.counts([7, keys[0]]) == [None, counts[0]]


def test_an_empty_folder_knows_nothing(tmp_path):
    rows = MappedRows(tmp_path)
    assert (len(rows), 3 in rows, rows.counts([3]), rows.shards) == (0, False, [None], [])
    rows.write()
    assert not list(tmp_path.iterdir())


def test_files_are_mapped_and_not_read(tmp_path):
    """16 MiB of rows, of which a process takes some."""
    for part in range(4):
        fill(tmp_path, range(8 * part, 8 * part + 8), width=2**16)
    before = anonymous_bytes()
    rows = MappedRows(tmp_path)
    total = sum(rows.take([key])["logits"].sum().item() for key in range(32))
    assert total == sum(range(32)) * 2**16
    assert anonymous_bytes() - before < 4 * 2**20


def test_the_index_takes_16_bytes_an_example(tmp_path):
    rows = fill(tmp_path, range(1000))
    assert rows._keys.nbytes + rows._places.nbytes == 16_000
    assert rows._starts.nbytes <= 16


def test_what_was_added_is_written_when_it_is_as_large_as_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_rows, "SHARD_BYTES", 100)
    rows = MappedRows(tmp_path)
    for key in range(5):
        rows.add([key], [1], {"logits": torch.full((1, 10), float(key))})  # of 40 bytes
    assert len(MappedRows(tmp_path)) == 3
    assert len(rows) == 5
    rows.write()
    assert MappedRows(tmp_path).take([4, 1])["logits"][:, 0].tolist() == [4.0, 1.0]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_torn_file_is_passed_over_and_made_whole_when_its_rows_are_written_again(tmp_path, share):
    (name,) = fill(tmp_path, [1, 2]).shards
    fill(tmp_path, [3])
    torn = tmp_path / name
    whole = torn.read_bytes()
    torn.write_bytes(whole[: int(share * len(whole))])
    rows = MappedRows(tmp_path)
    assert rows.counts([1, 2, 3]) == [None, None, 1]
    fill(tmp_path, [1, 2])
    assert torn.read_bytes() == whole
    assert MappedRows(tmp_path).counts([1, 2, 3]) == [1, 1, 1]


def test_a_file_that_is_being_written_is_not_seen(tmp_path, monkeypatch):
    def killed(tensors, path):
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr(mapped_rows, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, [1, 2])
    assert list(tmp_path.iterdir())
    assert len(MappedRows(tmp_path)) == 0


def test_processes_write_to_one_folder_at_the_same_time(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=fill_in_turn, args=(tmp_path, part, barrier)) for part in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    keys = [*range(40), *range(100, 140), 1000, 1010, 1020, 1030]
    rows = MappedRows(tmp_path)
    assert len(rows) == len(keys)
    assert rows.take(keys)["logits"][:, 0].tolist() == keys


def test_of_an_example_in_several_files_every_process_takes_the_same(tmp_path):
    shards = {}
    for part in range(4):
        folder = tmp_path / str(part)
        folder.mkdir()
        rows = MappedRows(folder)
        rows.add([part, 9], [1, 1], {"logits": torch.full((2, 1), float(part))})
        rows.write()
        shards |= {path.name: path.read_bytes() for path in folder.iterdir()}
    found = []
    for order in (sorted(shards), sorted(shards, reverse=True)):
        folder = tmp_path / order[0]
        folder.mkdir()
        rows = MappedRows(folder)
        for name in order:
            (folder / name).write_bytes(shards[name])
            rows.read()
        assert len(rows) == 5
        found.append(rows.take([9])["logits"].item())
    assert found[0] == found[1]


def test_files_of_another_kind_are_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors holds no rows by key; name a folder"):
        MappedRows(tmp_path)
