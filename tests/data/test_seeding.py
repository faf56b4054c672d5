"""Random transforms of the data are the same after a resume, whoever makes the batches, and another in every epoch."""

import random

import datasets
import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_blockkd.data.seeding import SeededBatches

from ..helpers.tiny_models import tiny_vit
from ..helpers.training import assert_same_state, image_rows, make_trainer, state_of, step_logs


def noise():
    """Of all three global random states."""
    return 0.1 * torch.randn(1, 8, 8) + random.random() + float(np.random.rand())


class NoisyRows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {**row, "pixel_values": row["pixel_values"] + noise()}


def noisy_dataset(rows):
    """A data set of the hub's library that transforms whole batches of rows when they are read."""
    columns = {name: [row[name].tolist() for row in rows] for name in rows[0]}

    def transform(batch):
        images = [torch.tensor(image) + noise() for image in batch["pixel_values"]]
        return {"pixel_values": images, "labels": [torch.tensor(label) for label in batch["labels"]]}

    return datasets.Dataset.from_dict(columns).with_transform(transform)


def noisy_collator(rows):
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "pixel_values": batch["pixel_values"] + noise()}


KINDS = {
    "rows": (NoisyRows, None),
    "dataset": (noisy_dataset, None),
    "collator": (list, noisy_collator),
}


def trained(folder, kind, resume=None, **settings):
    torch.manual_seed(0)
    student, teacher = tiny_vit(num_hidden_layers=2, hidden_dropout_prob=0.1), tiny_vit()
    make_data, collator = KINDS[kind]
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 9, "learning_rate": 1e-2, **settings}
    trainer = make_trainer(folder, student, teacher, make_data(image_rows(24)), **settings)
    trainer.data_collator = collator or trainer.data_collator
    trainer.train(resume and str(resume))
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_sees_the_same_random_transforms(tmp_path, kind):
    unbroken = trained(tmp_path / "unbroken", kind)
    for step in (4, 6):  # in the midst of an epoch, and at the end of one
        resumed = trained(tmp_path / "resumed", kind, tmp_path / "unbroken" / f"checkpoint-{step}")
        assert_same_state(state_of(resumed.model), state_of(unbroken.model))
        assert step_logs(resumed) == step_logs(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"dataloader_persistent_workers": True}, {"gradient_accumulation_steps": 2}])
def test_worker_processes_make_the_same_batches_as_the_process_itself_and_after_a_resume(tmp_path, settings):
    by_workers = trained(tmp_path / "workers", "rows", dataloader_num_workers=2, **settings)
    checkpoint = tmp_path / "workers" / "checkpoint-4"
    resumed = trained(tmp_path / "resumed", "rows", checkpoint, dataloader_num_workers=2, **settings)
    assert_same_state(state_of(resumed.model), state_of(by_workers.model))
    if "dataloader_persistent_workers" not in settings:  # whose seed would be drawn before the dropout
        alone = trained(tmp_path / "alone", "rows", **settings)
        assert_same_state(state_of(alone.model), state_of(by_workers.model))


def test_every_epoch_seed_and_batch_has_transforms_of_its_own():
    batches = SeededBatches(NoisyRows(image_rows(8)), noisy_collator, seed=0)
    first = batches.make([0, 1])["pixel_values"]
    assert torch.equal(batches.make([0, 1])["pixel_values"], first)
    assert not torch.equal(batches.make([0, 2])["pixel_values"][0], first[0])
    assert not torch.equal(SeededBatches(batches.dataset, noisy_collator, seed=1).make([0, 1])["pixel_values"], first)
    batches.epoch.fill_(1)
    assert not torch.equal(batches.make([0, 1])["pixel_values"], first)


def test_making_a_batch_leaves_the_random_states_as_they_were():
    batches = SeededBatches(NoisyRows(image_rows(8)), noisy_collator, seed=0)
    states = [(random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())]
    batches.make([0, 1])
    states.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))
    assert states[0] == states[1]


class Epochs(torch.utils.data.Dataset):
    """Rows with noise of their own, that want to know the epoch."""

    def __init__(self):
        self.rows, self.epochs, self.noise, self.colour = image_rows(8), [], [], "blue"

    def __len__(self):
        return 8

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __getitem__(self, index):
        self.noise.append((index, torch.rand(()).item()))
        return self.rows[index]


class AskForData(TrainerCallback):
    """Looks at the training data in the midst of a run."""

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        self.seen = train_dataloader.dataset
        next(iter(self.trainer.get_train_dataloader()))


@pytest.mark.parametrize("asks", [False, True])
def test_a_data_set_is_told_the_epoch_and_its_noise_differs_from_epoch_to_epoch(tmp_path, asks):
    data, callback = Epochs(), AskForData()
    settings = {"num_train_epochs": 3, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 8}
    trainer = make_trainer(
        tmp_path,
        tiny_vit(num_hidden_layers=2),
        tiny_vit(),
        data,
        callbacks=[callback] if asks else [],
        connector_start="random",
        **settings,
    )
    callback.trainer = trainer
    trainer.train()
    assert sorted(set(data.epochs)) == [0, 1, 2]
    noise = [value for index, value in data.noise if index == 0]
    if asks:
        assert callback.seen.colour == "blue"
        # Each look at the data makes the first batch of epoch 0 once more.
        noise = [value for value in noise if value != noise[0]] + noise[:1]
    assert len(set(noise)) == 3


class NoisyEpochs(NoisyRows):
    """Noise that grows from epoch to epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        row = super().__getitem__(index)
        return {**row, "pixel_values": row["pixel_values"] + self.epoch}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resume_in_the_midst_of_any_epoch_ends_with_the_same_bits(tmp_path, workers):
    def run(folder, checkpoint=None):
        torch.manual_seed(0)
        trainer = make_trainer(
            folder,
            tiny_vit(num_hidden_layers=2),
            tiny_vit(),
            NoisyEpochs(image_rows(16)),
            max_steps=10,
            save_strategy="steps",
            save_steps=1,
            connector_start="random",
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
        )
        trainer.train(checkpoint)
        return state_of(trainer.model)

    unbroken = run(tmp_path / "unbroken")
    for step in (2, 6, 9) if workers == 0 else (6,):
        checkpoint = str(tmp_path / "unbroken" / f"checkpoint-{step}")
        assert_same_state(run(tmp_path / f"resumed-{step}", checkpoint), unbroken)
