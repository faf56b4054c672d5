"""From a name or a folder to a model with its head: `load_model`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils.modeling import get_state_dict_offloaded_model
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .classes import is_headless
from .cut import Cut
from .pooling import Pooling, transformer_folder

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def load_model(name: str, config_only: bool = False, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a model of the class that its config names.

    Args:
        name: Hub name, or folder written by `save_pretrained`.
        config_only: Build it with random weights instead, so that nothing but the config is needed or downloaded.
        dtype: Of its weights; default: the one that its config names.

    Returns:
        The model in eval mode. That of a folder with `cut.json` has it as its
        attribute `cut`, as `make_student` left it; a model without a head, of sentence-transformers, its `Pooling` as
        `pooling`.

    Raises:
        OSError: If there is no such model, or no network to fetch it.
        ValueError: If the config names no model type or no class that transformers has, or builds no model, or the
            model brings code of its own, which is never run, or `cut.json` holds no cut, or `modules.json` more than a
            transformer, pooling and normalisation.

    Example:
        ```python
        >>> import tempfile
        >>> from transformers import GPT2Config
        >>> from hf_blockkd.models.loading import load_model
        >>> config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, architectures=["GPT2LMHeadModel"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config.save_pretrained(folder)
        ...     type(load_model(folder, config_only=True)).__name__
        'GPT2LMHeadModel'

        ```
    """
    # A hub name is at most an owner and a name; transformers would complain about its form instead.
    if (name.startswith((".", "/")) or name.count("/") > 1) and not Path(name).is_dir():
        raise OSError(f"There is no folder {name!r}; give a folder written by `save_pretrained`, or a hub name.")
    folder, name = name, transformer_folder(name)
    _check_model_type(name)
    # Said outright: left open, transformers would ask on the terminal whether to run the code that comes with a model.
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if dtype is not None:
        config.dtype = dtype
    model_class = _model_class(name, config)
    if not config_only:
        cut = Cut.load(name)
        model = model_class.from_pretrained(name, trust_remote_code=False, dtype="auto" if dtype is None else dtype)
        if cut is not None:
            model.cut = cut
        return _with_pooling(model, folder)
    try:
        return _with_pooling(model_class._from_config(config).eval(), folder)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"The config of {name!r} builds no {model_class.__name__} ({type(error).__name__}: {error}); complete its "
            "fields, of which some models cannot do without those that are open by default."
        ) from error


def _with_pooling(model: PreTrainedModel, name: str) -> PreTrainedModel:
    pooling = Pooling.load(name) if is_headless(model) else None
    if pooling is not None:
        model.pooling = pooling
    return model


def _model_class(name: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config names, among those of the auto classes alone: a stranger wrote that name."""
    architectures = config.architectures
    architecture = architectures[0] if isinstance(architectures, (list, tuple)) and architectures else architectures
    if isinstance(architecture, str) and architecture in _listed_classes() and hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    # A person's own classes, for which `AutoModelFor....register` was called.
    for mapping in _tables("_MAPPING"):
        found = mapping.get(type(config), None)
        if found is not None and getattr(found, "__name__", None) == architecture:
            return found
    raise ValueError(
        f"The config of {name!r} names {architecture or 'nothing'!r} in `architectures`, which is no model class of "
        "transformers; name one there, e.g. BertForSequenceClassification."
    )


def _listed_classes() -> set[str]:
    """Names of all model classes that transformers' auto classes choose from."""
    listed = (entry for table in _tables("_NAMES") for entry in table.values())
    return {name for entry in listed for name in ((entry,) if isinstance(entry, str) else entry)}


def _tables(ending: str) -> Iterator[Mapping[Any, Any]]:
    """Of every auto class, what it chooses from: config class -> class, or model type -> name of the class."""
    for name, table in vars(modeling_auto).items():
        if name.startswith("MODEL_") and name.endswith(ending):
            yield table


def _check_model_type(name: str) -> None:
    try:
        fields, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        # Without a network, transformers says of no name what was looked for.
        if Path(name).is_dir():
            raise
        raise OSError(f"{name!r} is no folder here, and no model of that name was found: {error}") from error
    model_type = fields.get("model_type")
    # Models that bring code of their own have types of their own; where there is none, transformers may guess.
    if model_type is None or model_type in CONFIG_MAPPING or "auto_map" in fields:
        return
    raise ValueError(
        f"The config of {name!r} has the model type {model_type!r}, which transformers {transformers.__version__} does "
        "not know; correct `model_type` there, or install a version of transformers that knows it."
    )


def place(model: PreTrainedModel, device: torch.device) -> None:
    """Move a model to a device, unless Accelerate's hooks move its weights or its inputs (offload, `device_map`)."""
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        model.to(device)


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict of a model, wherever Accelerate's hooks keep its weights."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return get_state_dict_offloaded_model(model)
    return model.state_dict()


def has_no_weights(name: str) -> bool:
    """Whether `name` is a folder with a config at most, so that a model from it can only have random weights."""
    folder = Path(name)
    return folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES)
