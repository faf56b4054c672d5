"""From the states of a model without a head to one vector for each example, as sentence-transformers has it: `Pooling`.

The format is that of its folders: `modules.json` names the modules, `1_Pooling/config.json` says how states are pooled,
and `2_Normalize` that vectors are brought to length 1. The library itself is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch.nn import functional as F
from transformers import PreTrainedModel

MODULES = "modules.json"
CONFIG = "config.json"
SETTINGS = ("sentence_bert_config.json", "config_sentence_transformers.json")
"""Files that say how texts are cut off and which prompts stand before them; a student takes them over as they are."""
PREFIX = "sentence_transformers.models."
"""Of the types in `modules.json`, by names that every version of the library reads."""


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _sum(states, mask) / mask.sum(1, keepdim=True).clamp(min=1e-9)


def _mean_sqrt_len(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _sum(states, mask) / mask.sum(1, keepdim=True).clamp(min=1e-9).sqrt()


def _weighted_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Positions count as much as their number, from 1 at the first that is no padding."""
    numbers = torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=mask.dtype)
    weights = mask * (numbers - mask.argmax(1, keepdim=True))
    return _sum(states, weights) / weights.sum(1, keepdim=True).clamp(min=1e-9)


def _max(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(mask[..., None] == 0, float("-inf")).amax(1)


def _first(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _at(states, mask.argmax(1))


def _last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _at(states, mask.shape[1] - 1 - mask.flip(1).argmax(1))


def _sum(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (states * weights[..., None]).sum(1)


def _at(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return states[torch.arange(len(states), device=states.device), places]


MODES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
"""How states (B, T, D) and a mask (B, T) of ones and zeros become vectors (B, D), in the order in which the library
joins several."""
_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@dataclass(frozen=True)
class Pooling:
    """How the states of a model become one vector.

    Attributes:
        modes: Names of `MODES`; the vectors of several are joined.
        normalize: Whether vectors are brought to length 1.
        settings: The other files of the folder that it was read from, by name.

    Raises:
        ValueError: For a mode that is not known.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.models.pooling import Pooling
        >>> states = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [9.0, 9.0]]])
        >>> mean = Pooling(normalize=True)
        >>> mean.pool(states, torch.tensor([[1, 1, 0]])).tolist()
        [[2.0, 2.0]]
        >>> mean(states, torch.tensor([[0, 1, 0]])).tolist()
        [[0.6000000238418579, 0.800000011920929]]

        ```
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False
    settings: dict[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"The pooling {mode!r} is unknown; choose {', '.join(map(repr, MODES))}.")

    def __str__(self) -> str:
        return "+".join(self.modes) + ", normalized" * self.normalize

    def pool(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Vectors of any length, at least in float32.

        Args:
            states: What a model returns, (B, T, D), or a map (B, D, H, W).
            mask: (B, T), 0 at positions that are padding; default: there are none.

        Returns:
            (B, number of modes * D).
        """
        states = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        mask = states.new_ones(states.shape[:2]) if mask is None else mask.to(states)
        return torch.cat([MODES[mode](states, mask) for mode in self.modes], dim=-1)

    def finish(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (B, D) brought to length 1, where they are."""
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def __call__(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`pool`, then `finish`."""
        return self.finish(self.pool(states, mask))

    @classmethod
    def load(cls, name: str) -> Pooling | None:
        """Read that of a folder, or of a hub name; `None` where there is no `modules.json`.

        Raises:
            ValueError: If its modules do something else than pool states and normalise.
        """
        modules = _read(name, MODULES)
        if modules is None:
            return None
        kinds = [(module["type"].rsplit(".", 1)[-1], module["path"]) for module in json.loads(modules)]
        kinds = [(kind, path) for kind, path in kinds if kind != "Dropout"]
        names = [kind for kind, _ in kinds]
        if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise ValueError(
                f"{name!r} is made of {', '.join(names)}, but only Transformer, Pooling and Normalize can be "
                "distilled here, in this order; load its transformer with AutoModel, and say `pooling`."
            )
        config = json.loads(_read(name, f"{kinds[1][1]}/{CONFIG}") or "{}")
        if not config.get("include_prompt", True):
            raise ValueError(f"{name!r} leaves prompts out of its pooling, which is not done here; name another model.")
        modes = config.get("pooling_mode") or [mode for mode, flag in _FLAGS.items() if config.get(flag)] or "mean"
        root = kinds[0][1]
        found = {one: _read(name, f"{root}/{one}" if root and one == SETTINGS[0] else one) for one in SETTINGS}
        settings = {one: text for one, text in found.items() if text is not None}
        return cls((modes,) if isinstance(modes, str) else tuple(modes), names[-1] == "Normalize", settings)

    def save(self, folder: str | Path, width: int) -> None:
        """Write what makes a folder with a model and its tokenizer one of sentence-transformers.

        Args:
            folder: Where the model lies.
            width: Of its states.
        """
        folder = Path(folder)
        names = ["Transformer", "Pooling", *["Normalize"] * self.normalize]
        paths = ["", *(f"{place}_{kind}" for place, kind in enumerate(names) if place)]
        modules = [
            {"idx": place, "name": str(place), "path": path, "type": PREFIX + kind}
            for place, (kind, path) in enumerate(zip(names, paths, strict=True))
        ]
        config: dict[str, Any] = {"word_embedding_dimension": width}
        in_order = [mode for mode in MODES if mode in self.modes]
        if list(self.modes) == in_order:
            config |= {flag: mode in self.modes for mode, flag in _FLAGS.items()}
        else:
            config["pooling_mode"] = list(self.modes)
        for path in paths[1:]:
            (folder / path).mkdir(exist_ok=True)
        for name, content in ((MODULES, modules), (f"{paths[1]}/{CONFIG}", config)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, text in self.settings.items():
            (folder / name).write_text(text, encoding="utf-8")


def save_pooling(model: PreTrainedModel, pooling: Pooling | None, folder: str | Path) -> None:
    """Make a folder of a model of texts one of sentence-transformers; for other models, and without a pooling, nothing.

    Args:
        model: What lies there.
        pooling: Of its states.
        folder: Where.
    """
    if pooling is not None and model.main_input_name == "input_ids":
        pooling.save(folder, model.config.get_text_config().hidden_size)


def transformer_folder(name: str) -> str:
    """Where the transformer of a folder of sentence-transformers lies, which may be one inside it."""
    path = Path(name)
    if (path / CONFIG).is_file() or not (path / MODULES).is_file():
        return name
    return str(path / json.loads((path / MODULES).read_text(encoding="utf-8"))[0]["path"])


def _read(name: str, file: str) -> str | None:
    """A file of a folder, or of a model on the hub; `None` where there is none."""
    path = Path(name, file)
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(name, file))
        except EntryNotFoundError:
            return None
    return path.read_text(encoding="utf-8") if path.is_file() else None
