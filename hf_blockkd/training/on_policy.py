"""Texts that the student writes itself, as the data of a step: `with_completions`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..config import BlockwiseDistillConfig
from ..data.seeding import random_states
from ..losses.rows import IGNORED
from ..pairing.distilled_rows import DISTILL_MASK
from ..pairing.tasks import Task
from ..routing.forwards import in_eval_mode

KNOWN_KEYS = ("input_ids", "attention_mask", "labels")
"""What of a batch is known to go on in a completion; anything else would belong to the text that was there before."""


def check_on_policy(args: BlockwiseDistillConfig, task: Task, distils: bool = True) -> None:
    """Raise a `ValueError` if `lmbda` is set and completions of the student's own cannot be trained on.

    Args:
        args: The configuration.
        task: Of both models.
        distils: Whether rows without a label teach anything.
    """
    if not args.lmbda:
        return
    if not (task.shifted and task.over_vocabulary):
        raise ValueError(
            f"`lmbda` is {args.lmbda}, but {task.name} is no causal language model, which could complete a prompt; set "
            "it to 0."
        )
    reasons = {
        f"objective={args.objective!r}": (not distils, "learns from labels alone, which completions do not have"),
        f"teacher_cache={args.teacher_cache!r}": (args.teacher_cache is not None, "knows no text that is yet to come"),
    }
    for setting, (is_set, reason) in reasons.items():
        if is_set:
            raise ValueError(f"`lmbda` is {args.lmbda}, but `{setting}` {reason}; set it to 0, or choose another one.")


def is_on_policy(share: float, seed: int, step: int) -> bool:
    """Whether the student writes the data of an optimizer step: drawn from the seed and the step alone.

    So it is the same after a resume, and on every rank.

    Args:
        share: `lmbda`, the share of steps.
        seed: Of the run.
        step: Optimizer steps done so far.

    Example:
        ```python
        >>> from hf_blockkd.training.on_policy import is_on_policy
        >>> [is_on_policy(0.5, seed=42, step=step) for step in range(6)]
        [True, True, True, True, False, False]

        ```
    """
    return random.Random(f"{seed}-{step}-on-policy").random() < share


def with_completions(
    batches: Iterator[dict[str, Any]],
    model: PreTrainedModel,
    args: BlockwiseDistillConfig,
    step: int,
    accelerator: Accelerator,
    processing_class: Any = None,
) -> Iterator[dict[str, Any]]:
    """The micro-batches of an optimizer step, as they are, or with the student's own completions of their prompts.

    A prompt is what stands before the first label of an example, and all of an example without any. The student
    completes it in eval mode, by transformers' `generate`, as its own `generation_config` says: greedily, unless that
    says `do_sample=True`, as GKD has it (Agarwal et al., 2024, arXiv 2306.13649, algorithm 1). What is drawn depends on
    the seed, the step, the rank and the place of the micro-batch in the step.

    Args:
        batches: Whose next ones are those of an accumulation window, on the device.
        model: The student, which is left in the mode that it was in.
        args: The configuration.
        step: Optimizer steps done so far.
        accelerator: Of the run.
        processing_class: The tokenizer, or a processor that has one.

    Raises:
        ValueError: For batches whose texts cannot be completed; also at steps at which they are not, so that the first
            one tells.
    """
    if not args.lmbda:
        return batches
    writes = is_on_policy(args.lmbda, args.seed, step)
    pad = _pad_token(model, processing_class)

    def complete(index: int, inputs: dict[str, Any]) -> dict[str, Any]:
        prompts, mask = left_padded_prompts(inputs, pad)
        room = _room(model, args.max_new_tokens, prompts.shape[1])
        if not writes:
            return inputs
        key = f"{args.seed} {step} {index} {accelerator.process_index}"
        eager = torch.compiler.set_stance("force_eager")  # lengths change with every token
        with in_eval_mode(model), random_states(key, accelerator.device), eager, accelerator.autocast():
            sequences = model.generate(
                input_ids=prompts,
                attention_mask=mask,
                max_new_tokens=room,
                pad_token_id=pad,
                num_return_sequences=1,
                return_dict_in_generate=False,
            )
        return completed(sequences, mask, model.generation_config.eos_token_id, pad)

    # Not a generator, which would close with a window what the next one reads on.
    return map(complete, itertools.count(), batches)


def left_padded_prompts(inputs: Mapping[str, Any], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What of a batch stands before the labels, padded on the left as `generate` wants it.

    Args:
        inputs: The batch, padded on either side.
        pad: The token to pad with.

    Returns:
        Token ids (B, T), and the mask of those that are no padding.

    Raises:
        ValueError: If examples have no prompt, or the batch holds more than one text in a row.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.training.on_policy import left_padded_prompts
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0]]),
        ...          "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        ...          "labels": torch.tensor([[-100, -100, 7, 8], [-100, -100, -100, -100]])}
        >>> left_padded_prompts(batch, pad=0)[0].tolist()
        [[0, 5, 6], [5, 6, 7]]

        ```
    """
    unknown = [name for name in inputs if name not in KNOWN_KEYS]
    if unknown:
        raise ValueError(
            f"The batch holds {', '.join(map(repr, unknown))}, which `lmbda` cannot continue along with the student's "
            "completions; give every prompt a row of its own (no packing, no padding-free batches) and nothing beside "
            "`input_ids`, `attention_mask` and `labels`, or set `lmbda` to 0."
        )
    ids, mask, labels = (inputs.get(name) for name in KNOWN_KEYS)
    is_prompt = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if labels is not None:
        is_prompt = is_prompt & ((labels != IGNORED).cumsum(1) == 0)
    lengths = is_prompt.sum(1, keepdim=True)
    empty = (lengths == 0).flatten().nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"Examples {empty} of a batch have no prompt for the student to complete; set the labels of their prompts "
            f"to {IGNORED}, or `lmbda` to 0."
        )
    width = int(lengths.max())
    left_mask = torch.arange(width, device=ids.device) >= width - lengths
    prompts = ids.new_full((len(ids), width), pad)
    prompts[left_mask] = ids[is_prompt]
    return prompts, left_mask.long()


def completed(
    sequences: torch.Tensor, prompt_mask: torch.Tensor, eos: int | list[int] | None, pad: int
) -> dict[str, torch.Tensor]:
    """A batch of what the student wrote, padded on the right: rows without labels, to be distilled where it wrote.

    Args:
        sequences: (B, T + N), from `generate`: prompts padded on the left, and what follows them.
        prompt_mask: (B, T), which tokens of the prompts are no padding.
        eos: The token, or tokens, that end a text and belong to it.
        pad: The token that follows them.

    Raises:
        ValueError: If nothing follows a prompt.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.training.on_policy import completed
        >>> batch = completed(torch.tensor([[0, 5, 6, 2, 0], [5, 6, 7, 8, 9]]), torch.tensor([[0, 1], [1, 1]]), 2, 0)
        >>> batch["input_ids"].tolist(), batch["distill_mask"].long().tolist()
        ([[5, 6, 2, 0, 0], [5, 6, 7, 8, 9]], [[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]])

        ```
    """
    written = sequences[:, prompt_mask.shape[1] :]
    ends = torch.isin(written, torch.as_tensor([] if eos is None else eos, device=written.device).to(written))
    is_before_end = ends.cumsum(1) - ends.long() == 0
    # Something else may have stopped it, such as a string, after which there is padding, too.
    is_padding = (written != pad).flip(1).cumsum(1).flip(1) == 0
    is_written = is_before_end & (ends | ~is_padding)
    if not is_written.any(1).all():
        empty = (~is_written.any(1)).nonzero().flatten().tolist()
        raise ValueError(
            f"The student wrote nothing after the prompts of examples {empty} of a batch; check `max_new_tokens` and "
            "its `generation_config`, or set `lmbda` to 0."
        )
    kept = torch.cat([prompt_mask.bool(), is_written], dim=1)
    starts, lengths = prompt_mask.sum(1, keepdim=True), kept.sum(1, keepdim=True)
    places = torch.arange(int(lengths.max()), device=kept.device)
    mask = places < lengths
    ids = sequences.new_full(mask.shape, pad)
    ids[mask] = sequences[kept]
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": torch.full_like(ids, IGNORED),
        DISTILL_MASK: mask & (places >= starts),
    }


def _pad_token(model: PreTrainedModel, processing_class: Any) -> int:
    """The tokenizer's, or else the model's own."""
    sources = getattr(processing_class, "tokenizer", processing_class), model.generation_config, model.config
    found = [token for token in (getattr(source, "pad_token_id", None) for source in sources) if token is not None]
    if not found:
        raise ValueError(
            "`lmbda` needs a token to pad prompts of unequal length with, but neither the tokenizer nor the student's "
            "config has one; set `tokenizer.pad_token = tokenizer.eos_token` and pass it as `processing_class`."
        )
    return found[0]


def _room(model: PreTrainedModel, max_new_tokens: int, length: int) -> int:
    """How many tokens may follow prompts of a length: fewer than asked for where the model's positions end."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length >= positions:
        raise ValueError(
            f"A prompt of {length} tokens leaves no room for a completion in the {positions} positions of "
            f"{type(model).__name__}; cut the prompts, or set `lmbda` to 0."
        )
    return max_new_tokens if positions is None else min(max_new_tokens, positions - length)
