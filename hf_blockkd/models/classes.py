"""What a model's class says of it: `transformers_class`, `is_headless`."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, MODEL_MAPPING_NAMES


def transformers_class(model: PreTrainedModel) -> type:
    """The class of transformers' own that a model is or descends from, else its own class."""
    return next((one for one in type(model).__mro__ if one.__module__.startswith("transformers.models.")), type(model))


def is_headless(model: PreTrainedModel) -> bool:
    """Whether a model is a body alone, as `AutoModel` makes it: what it returns are states.

    Example:
        ```python
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> from hf_blockkd.models.classes import is_headless
        >>> model = BertForMaskedLM(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
        >>> is_headless(model), is_headless(model.bert)
        (False, True)

        ```
    """
    listed = (*MODEL_MAPPING_NAMES.values(), *MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.values())
    names = {name for entry in listed for name in ((entry,) if isinstance(entry, str) else entry)}
    name = transformers_class(model).__name__
    # Of some families, the plain class has a head.
    return model.base_model is model and name in names and "For" not in name
