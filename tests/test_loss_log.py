"""What is logged is added up on the device; only a logging step waits for it."""

import torch

from hf_blockkd.loss_log import LossLog
from hf_blockkd.losses import BlockKDLoss


def test_adding_the_losses_of_a_step_never_reads_them():
    """A meta tensor has no value: whatever waits for one raises."""
    value = torch.zeros((), device="meta")
    loss = BlockKDLoss(value, value, value, value, {1: value}, {1: value})
    log = LossLog()
    for step in range(3):
        log.add(loss, 2.0, step, {1: 0.5})
