"""What is logged is added up on the device; only a logging step waits for it."""

import torch
from accelerate import Accelerator

from hf_blockkd.losses.learners import DistillationLoss, Learner, LearnerTerms
from hf_blockkd.training.loss_log import LossLog


def test_adding_the_losses_of_a_step_never_reads_them():
    """A meta tensor has no value: whatever waits for one raises."""
    value = torch.zeros((), device="meta")
    terms = LearnerTerms(value, value, value)
    loss = DistillationLoss(value, value, value, value, {1: terms}, {"hint": value})
    log = LossLog()
    for step in range(3):
        log.add(loss, {1: Learner(value, rate=0.5)}, 2.0, step)


def test_nothing_grows_when_nothing_is_logged():
    log, zero = LossLog(), torch.zeros(())
    loss = DistillationLoss(zero, zero, zero, zero, {1: LearnerTerms(zero, zero, zero)}, {})
    for step in range(1000):
        log.add(loss, {1: Learner(zero)}, 1.0, step)
    assert sum(len(held) for held in vars(log).values()) < 20
    assert log._steps["loss_task"] == (1000, 999)


def test_weights_are_averaged_over_steps_however_many_micro_batches_these_have():
    log, one = LossLog(), torch.ones(())
    loss = DistillationLoss(one, one, one, one, {}, {"state": one})
    for step, weight in ((0, 5.0), (0, 5.0), (1, 4.0), (1, 4.0)):
        log.add(loss, {}, 0.5, step, {"state_weight": weight})
    taken = log.take(Accelerator(cpu=True))
    assert (taken["loss_state"], taken["state_weight"]) == (1.0, 4.5)
    log.add(loss, {}, 1.0, 2, {"state_weight": 3.0})
    assert log.take(Accelerator(cpu=True))["state_weight"] == 3.0
