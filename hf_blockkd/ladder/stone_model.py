"""A stepping stone as a model of its own: `SteppingStone`."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput, find_labels

from ..connectors.geometry import Geometry
from ..connectors.maps import connect, make_connectors
from ..models.heads import find_head, without_logits
from ..routing.dummy_inputs import dummy_inputs
from ..routing.entering import Extras, capture_states, enter_at, record_extras
from ..routing.errors import UnsupportedArchitectureError
from ..routing.examples import has_tensors, map_tensors
from ..routing.forwards import forward_parameters, in_eval_mode
from ..routing.layers import LayerStack, find_layer_stack
from ..routing.logits import main_outputs, without_the_rest
from .caches import counts_tokens, fill, parts

DESCRIPTION, BODY, TAIL = "stepping_stone.json", "student", "teacher"
CONNECTOR = "stepping_stone.safetensors"
"""Not the name of a run's connectors, beside which it may lie."""
CACHES = ("cache", "past_key_values", "cache_params")
"""What forwards call what is kept of earlier tokens; Mamba's has the third name before transformers 5.24."""
TOKENS = ("inputs_embeds", "input_ids")
OF_OUTPUTS = ("return_dict", "logits_to_keep", "output_attentions", "output_hidden_states", "num_items_in_batch")
"""Arguments that say what a forward returns."""
STUDENT_STATES = "student_states"
"""Of the outputs of both encoders, those of the student's."""


class SteppingStone(PreTrainedModel, GenerationMixin):
    """The first layers of a student, a connector, and the last layers of its teacher, as one model.

    It takes what the teacher takes and returns what the teacher returns, trains, evaluates, generates with a cache and
    runs in a `pipeline`. Make one with [`stone_model`], or with `BlockwiseDistillTrainer.save_stepping_stone` and
    [`load_stepping_stone`].

    Args:
        body: The student's part, up to the end of its block.
        tail: The teacher's part, with its head.
        exit: Layers of `body` that are run.
        entry: Layers of `tail` that are skipped.
        kind: Of the connector (`make_connector`).
        body_path: Dotted name of the layers of `body`, where they are not to be searched.
        tail_path: Likewise of `tail`.
    """

    config_class = PreTrainedConfig
    # Both parts have chosen their attention already.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        body: PreTrainedModel,
        tail: PreTrainedModel,
        exit: int,
        entry: int,
        kind: str = "auto",
        body_path: str | None = None,
        tail_path: str | None = None,
    ) -> None:
        super().__init__(copy.deepcopy(tail.config))
        self.body, self.tail = body, tail
        self.exit, self.entry, self.kind = exit, entry, kind
        self.body_path, self.tail_path = body_path, tail_path
        self.body_stack = find_layer_stack(body, body_path)
        self.tail_stack = find_layer_stack(tail, tail_path)
        self.main_input_name = tail.main_input_name
        self.generation_config = getattr(tail, "generation_config", None)
        self._geometry = Geometry(body, self.body_stack, tail, self.tail_stack, [exit], [entry])
        connectors = make_connectors(kind, *self._geometry.widths, seed=0)
        dtype = torch.promote_types(body.dtype, torch.float32)
        self.connector = self._geometry.bridge(connectors)[0].to(device=tail.device, dtype=dtype)
        self._body_head = find_head(body)
        self._parameters_of = {"body": forward_parameters(body), "tail": forward_parameters(tail)}
        self._extras = _handed_on(tail, self.tail_stack, entry) if entry else {}

    def __new__(cls, body: Any = None, tail: Any = None, *args: Any, **kwargs: Any) -> SteppingStone:
        if tail is None:  # a copy is being made
            return super().__new__(cls)
        # `Trainer`, `generate` and pipelines read off the forward's signature what a model takes.
        name = type(tail).__name__  # by which pipelines and `Trainer` tell what a model does
        own = type(name, (cls,), {"forward": _as_in(type(tail).forward), "__qualname__": f"{cls.__name__}[{name}]"})
        return super().__new__(own)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        return self.tail.device

    def run(self, *args: Any, **inputs: Any) -> ModelOutput:
        """The forward: that of the student's part, and that of the teacher's entered from its states."""
        inputs |= dict(zip(self._parameters_of["tail"], args, strict=False))
        cache = _first(inputs, CACHES)
        inputs = {name: value for name, value in inputs.items() if name not in CACHES}
        if cache is None and inputs.get("use_cache") and self._takes_caches:
            cache = DynamicCache()
            if self.config.is_encoder_decoder:
                cache = EncoderDecoderCache(cache, DynamicCache())
        caches = None, None
        if cache is not None:
            self._fill(cache)
            caches = parts(cache)
        self._geometry.fit(inputs)
        body_inputs = self._inputs("body", inputs, caches[0])
        with without_logits(self._body_head), capture_states(self.body_stack, [self.exit]) as states:
            self.body(**body_inputs)
        states = connect(self.connector, states[self.exit])
        tail_inputs = self._geometry.for_teacher(self._inputs("tail", inputs, caches[1]))
        with enter_at(self.tail_stack, self.entry, states, self._extras):
            outputs = self.tail(**tail_inputs)
        if isinstance(outputs, tuple):
            return tuple(cache if cache is not None and one is caches[1] else one for one in outputs)
        for name in CACHES:
            if cache is not None and outputs.get(name) is not None:
                outputs[name] = cache
        return outputs

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        if not self.config.is_encoder_decoder:
            return super().get_encoder(modality)
        return BothEncoders(*(part.get_encoder(modality) for part in (self.body, self.tail)))

    def _inputs(self, part: str, inputs: dict[str, Any], cache: Any) -> dict[str, Any]:
        """What goes to one of both models; labels, and what else is returned, are the teacher's business alone."""
        own = self._parameters_of[part]
        takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
        given = {name: value for name, value in inputs.items() if name in own or takes_more}
        if part == "body":
            encoded = given.get("encoder_outputs")
            if isinstance(encoded, ModelOutput) and STUDENT_STATES in encoded:
                given["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded[STUDENT_STATES])
            others = {*OF_OUTPUTS, *find_labels(type(self.body))}
            given = {name: value for name, value in given.items() if name not in others}
            given |= without_the_rest(self.body)
        elif cache is None:
            given |= {name: value for name, value in without_the_rest(self.tail).items() if name == "use_cache"}
        if cache is None:
            return given
        mask = given.get("attention_mask")
        if all(cache.is_linear) and mask is not None:  # of new tokens alone: what is past is in the states
            given["attention_mask"] = mask[:, -_first(inputs, TOKENS).shape[1] :]
        name = next((name for name in CACHES if name in own), "past_key_values")
        return {**given, name: cache, "use_cache": True}

    @functools.cached_property
    def _takes_caches(self) -> bool:
        """Whether both models keep what they know of earlier tokens in caches of the common kinds."""
        by_name = GenerationMixin._supports_default_dynamic_cache.__func__
        names_fit = all(by_name(type(model)) for model in (self.body, self.tail))
        return names_fit and counts_tokens(self.body.config, self.tail.config, self.entry)

    def _fill(self, cache: Cache, *lengths: Any) -> None:
        if not self._takes_caches:
            raise ValueError(
                f"`past_key_values` is a {type(cache).__name__}, which a stepping stone of {type(self.body).__name__} "
                f"and {type(self.tail).__name__} cannot fill from these layers; leave it out."
            )
        fill(cache, self.body.config, self.tail.config, self.entry, *lengths)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        given = _first(model_kwargs, CACHES)
        if given is None and not self._takes_caches:
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache, encoded = _first(model_kwargs, CACHES), model_kwargs.get("encoder_outputs")
        if cache is None:
            return
        longest = max(args[-1], generation_config.max_cache_len or 0)
        lengths = (longest, None if encoded is None else encoded[0].shape[1]) if given is None else (None, None)
        self._fill(cache, lengths)
        if generation_config.is_assistant:
            cache.activate_past_recording()

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        if _first(kwargs, CACHES) is None:  # the whole text is read again
            next_sequence_length = None
        inputs = self.tail.prepare_inputs_for_generation(input_ids, next_sequence_length=next_sequence_length, **kwargs)
        # Each model makes its masks itself: its windows may be others, and its kinds of layers, which may need none.
        masks = ("attention_mask", "decoder_attention_mask")
        return inputs | {name: kwargs[name] for name in masks if kwargs.get(name) is not None}

    def get_input_embeddings(self) -> nn.Module:
        return self.body.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.tail.get_output_embeddings()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Both parts, the connector, and what holds them together, for [`load_stepping_stone`]."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        state_dict = self.state_dict() if state_dict is None else state_dict
        for name, attribute in ((BODY, "body"), (TAIL, "tail")):
            weights = _of(attribute, state_dict)
            getattr(self, attribute).save_pretrained(folder / name, *args, state_dict=weights, **kwargs)
        connector = {name: one.detach().cpu().contiguous() for name, one in _of("connector", state_dict).items()}
        save_file(connector, folder / CONNECTOR, metadata={"format": "pt"})
        description = {name: getattr(self, name) for name in ("exit", "entry", "kind", "body_path", "tail_path")}
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


class BothEncoders(nn.Module):
    """The encoders of both parts of a stepping stone as one, which `generate` runs once before it writes.

    Args:
        body: The student's.
        tail: The teacher's, whose outputs and arguments are those of both.
    """

    def __init__(self, body: nn.Module, tail: nn.Module) -> None:
        super().__init__()
        self.body, self.tail = body, tail
        self.main_input_name = getattr(tail, "main_input_name", "input_ids")

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        outputs = self.tail(*args, **kwargs)
        outputs[STUDENT_STATES] = self.body(*args, **kwargs).last_hidden_state
        return outputs


def _as_in(forward: Any) -> Any:
    """`SteppingStone.run` under the signature of a model's own forward."""

    @functools.wraps(forward)
    def run(self: SteppingStone, *args: Any, **inputs: Any) -> ModelOutput:
        return self.run(*args, **inputs)

    run.__signature__ = inspect.signature(forward)
    return run


def _of(module: str, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of one module, by its own names."""
    return {name.removeprefix(f"{module}."): one for name, one in state_dict.items() if name.startswith(f"{module}.")}


def _first(inputs: Mapping[str, Any], names: Collection[str]) -> Any:
    """The first of these inputs that is given."""
    return next((inputs[name] for name in names if inputs.get(name) is not None), None)


def _spoiled(one: torch.Tensor) -> torch.Tensor:
    """Another tensor, which shows in whatever is computed of it, and whose indices are there in any table."""
    if one.dtype == torch.bool:
        return ~one
    return torch.full_like(one, torch.nan) if one.is_floating_point() or one.is_complex() else torch.zeros_like(one)


@torch.no_grad()
def _handed_on(tail: PreTrainedModel, stack: LayerStack, entry: int) -> Extras:
    """What skipped layers return besides hidden states, of which nothing that differs from batch to batch is read."""
    inputs = {**dummy_inputs(tail), **without_the_rest(tail)}
    with in_eval_mode(tail):
        with record_extras(stack) as extras, capture_states(stack, [entry]) as states:
            clean = main_outputs(tail(**inputs))
        if has_tensors(extras):
            extras, is_same = map_tensors(extras, _spoiled), False
            with suppress(Exception), enter_at(stack, entry, states[entry], extras):  # whatever nonsense leads to
                is_same = all(map(torch.equal, main_outputs(tail(**inputs)), clean))
            if not is_same:
                raise UnsupportedArchitectureError(
                    f"The layers of {type(tail).__name__} hand on more than hidden states, so that no stepping stone "
                    "is a model without the layers below it; save the student, or set `eval_stepping_stones` to "
                    "evaluate it."
                )
    return extras
