"""What makes a model's inputs, as it lies beside the model: `processing_of`."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor, PreTrainedTokenizerBase


def processing_of(name: str) -> Any:
    """The tokenizer, image processor or processor of a model.

    Args:
        name: Hub name or folder of the model.

    Returns:
        What `AutoProcessor` loads; `None` if there is nothing to load.

    Example:
        ```python
        >>> import tempfile
        >>> from transformers import ViTConfig, ViTImageProcessorPil
        >>> from hf_blockkd.models.processing import processing_of
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ViTConfig().save_pretrained(folder)
        ...     print(processing_of(folder))
        ...     _ = ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
        ...     processing_of(folder).size["height"]
        None
        8

        ```
    """
    try:
        processing = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    tokenizer = getattr(processing, "tokenizer", processing)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return processing
    # Where there is no vocabulary, transformers makes a tokenizer that knows no word but the special ones.
    return processing if len(tokenizer) > len(tokenizer.all_special_tokens) + 1 else None
