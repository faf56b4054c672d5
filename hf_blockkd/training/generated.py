"""What an encoder-decoder writes in evaluation, for metrics of texts: `generated_tokens`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..config import BlockwiseDistillConfig
from ..data.seeding import restored_random_states
from ..pairing.pair import Pair


def check_generates(args: BlockwiseDistillConfig, model: PreTrainedModel, deploys_stone: bool = False) -> None:
    """Raise a `ValueError` if `predict_with_generate` is set for what writes no texts of their own.

    Args:
        args: The configuration.
        model: The student.
        deploys_stone: Whether a stepping stone is what is evaluated.
    """
    if not args.predict_with_generate:
        return
    if not (model.config.is_encoder_decoder and model.can_generate()):
        raise ValueError(
            f"`predict_with_generate` is True, but {type(model).__name__} is no encoder-decoder that generates texts; "
            "set it to False."
        )
    if args.eval_stepping_stones or deploys_stone:
        cause = "`eval_stepping_stones`" if args.eval_stepping_stones else f"`objective={args.objective!r}`"
        raise ValueError(
            f"`predict_with_generate` is True, but {cause} evaluates stepping stones, which generate no texts; leave "
            "one of them out."
        )


def generated_tokens(
    model: PreTrainedModel, pair: Pair, inputs: Mapping[str, Any], args: BlockwiseDistillConfig, device: torch.device
) -> torch.Tensor:
    """The texts that the student writes for a batch, as `Seq2SeqTrainer` has them with `predict_with_generate`.

    Args:
        model: The student with all that is around it, in eval mode.
        pair: The models.
        inputs: The batch, with labels or without.
        args: The configuration.
        device: Whose random state is left as it is, whatever is sampled.

    Returns:
        (B, T) token ids, filled up to the greatest length by the token that pads.
    """
    given, labels = pair.inputs_for("student", inputs), inputs.get("labels")
    own = given.get("decoder_input_ids")
    if own is not None and labels is not None and own.shape == labels.shape:
        # They are made of the labels, which the text would go on from.
        given = {name: one for name, one in given.items() if not name.startswith("decoder_")}
    options = {"max_length": args.generation_max_length, "num_beams": args.generation_num_beams}
    options = {name: value for name, value in options.items() if value is not None}
    with restored_random_states(device):
        tokens = model.generate(**given, **options)
    settings = model.generation_config
    length = args.generation_max_length or settings.max_length or (settings.max_new_tokens or 0) + 1
    pad = settings.pad_token_id if settings.pad_token_id is not None else model.config.pad_token_id
    # Else texts of other batches would be filled up by -100, which stands for no token.
    return tokens if pad is None else F.pad(tokens, (0, max(0, length - tokens.shape[1])), value=pad)
