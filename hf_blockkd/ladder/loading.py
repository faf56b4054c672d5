"""From a folder to a stepping stone: `load_stepping_stone`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..models.loading import load_model
from .stone_model import BODY, CONNECTOR, DESCRIPTION, TAIL, SteppingStone


def load_stepping_stone(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Load what `BlockwiseDistillTrainer.save_stepping_stone` wrote.

    Args:
        folder: Its folder.

    Returns:
        The model in eval mode: a [`SteppingStone`], or a plain model of the teacher's class, where it is one.

    Raises:
        OSError: If there is no such folder.
        ValueError: If it holds no stepping stone.

    Example:
        ```python
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd import load_stepping_stone
        >>> from hf_blockkd.ladder.making import stone_model
        >>> from hf_blockkd.pairing.pair import Pair
        >>> shape = dict(n_head=2, vocab_size=99)
        >>> teacher = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, **shape))
        >>> student = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, **shape))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stone_model(Pair(student, teacher, num_blocks=2), 1).save_pretrained(folder)
        ...     type(load_stepping_stone(folder)).__name__
        'GPT2LMHeadModel'

        ```
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        return load_model(str(folder))
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        names = ("exit", "entry", "kind", "body_path", "tail_path")
        given = [fields[name] for name in names]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no stepping stone ({error!r}); save it again.") from error
    # The student, or the teacher, may have been a stepping stone itself.
    stone = SteppingStone(load_stepping_stone(folder / BODY), load_stepping_stone(folder / TAIL), *given)
    if not (folder / CONNECTOR).is_file():
        raise ValueError(f"{folder / CONNECTOR} is missing, without which there is no stepping stone; save it again.")
    stone.connector.load_state_dict(load_file(folder / CONNECTOR))
    return stone.eval()
