"""A learning rate where nobody has searched one: `usual_rate`."""

from __future__ import annotations

HIGHEST = 4e-3
"""Up to a width of 100, where states are compared."""
LOWEST = 2e-5
"""Reached at a width of 1,400; wider students were not searched."""
AT_WIDTH_1 = 40.0
"""Over the square of the width."""
OUTPUTS_ALONE = 0.25
"""Of that, where outputs alone are compared."""
NUM_STEPS = 600
"""About as many the searched runs have."""


def usual_rate(width: int, compares_states: bool = True, num_steps: int = NUM_STEPS) -> float:
    """The highest rate of AdamW, in a schedule that warms up and falls to none, for a student cut out of its teacher.

    It is what the searched rates of our benchmarks (`examples/benchmarks/README.md`) have in common: no more than 4e-3,
    falling with the square of the width, and a quarter of that where outputs alone are compared. Width stands for two
    things there that were not told apart, the width itself and how long the teacher was trained. All of them lie within
    a factor of three:

    | student, width | states: searched | here | outputs alone: searched | here |
    | --- | ---: | ---: | ---: | ---: |
    | CIFAR-10, 64 | 4e-3 to 1.6e-2 | 4e-3 | 5e-4 to 1e-3 | 1e-3 |
    | novels, 96 | 8e-3 | 4e-3 | 2e-3 | 1e-3 |
    | CIFAR-10, 128 | 2e-3 | 2.4e-3 | 1e-3 | 6.1e-4 |
    | SST-2, 192 | 4e-4 | 1.1e-3 | 4e-4 | 2.7e-4 |
    | SST-2, 384 | 1e-4 to 4e-4 | 2.7e-4 | 2e-4 | 6.8e-5 |

    A range test (Smith, 2017, arXiv 1506.01186) was tried in its place: 60 to 100 steps at rising rates, each loss over
    that of the untouched student on the same batch, and the rate at which half of the gain is left. With states it
    comes as near on CIFAR-10 and the novels, but is 3 to 11 times too high on SST-2, and a fiftieth of this rate on
    digits (86.1 % against 93.2); of outputs alone on CIFAR-10 it says 1.3e-4 to 6e-4. A cut student begins near a
    minimum, and what makes it worse for a few dozen steps makes it better in the end.

    A shorter run has as much less as it has fewer steps, since a high rate first leads away from the minimum near which
    a cut student begins: digits in 78 steps, 47.8 % before, came to 48.3 at 4e-3, 50.0 at 1.3e-3 and 52.8 at 4e-4.

    Args:
        width: Of the student's hidden states.
        compares_states: Whether errors of states are trained on.
        num_steps: Of the run.

    Example:
        ```python
        >>> from hf_blockkd.training.learning_rate import usual_rate
        >>> [usual_rate(width) for width in (64, 200, 8192)], usual_rate(64, compares_states=False)
        ([0.004, 0.001, 2e-05], 0.001)

        ```
    """
    rate = min(HIGHEST, AT_WIDTH_1 / width**2) * (1.0 if compares_states else OUTPUTS_ALONE)
    return max(LOWEST, rate * min(1.0, num_steps / NUM_STEPS))
