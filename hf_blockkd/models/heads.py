"""A model's head by itself: final hidden states in, the model's own logits out."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..routing.dummy_inputs import dummy_inputs
from ..routing.forwards import forward_parameters, in_eval_mode, replaced_forward
from ..routing.logits import main_outputs


class Head:
    """Everything that a language model does after its body: head, bias, scaling, soft-capping.

    Nothing of it is written again here. The model's own forward runs with its body skipped, so the logits are those
    that the model itself would return, for as few positions at a time as memory allows.

    Args:
        model: A model with output embeddings outside its body (`model.base_model`); see `find_head`.

    Example:
        ```python
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd.models.heads import Head
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99)).eval()
        >>> head, inputs = Head(model), {"input_ids": torch.tensor([[1, 2, 3]])}
        >>> with head.capture() as captured:
        ...     _ = model(**inputs)
        >>> torch.allclose(head(captured["states"][0]), model(**inputs).logits[0], atol=1e-6)
        True

        ```
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.body = model.base_model
        # What is hung on the model later, as connectors are, is no part of its head.
        self._children = [name for name, _ in model.named_children()]
        # Held between a capture and its use, to be returned again with other states.
        self._body_output: ModelOutput | tuple[Any, ...] | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The head's trainable parameters, weights that it shares with the embeddings included."""
        inside = {id(parameter) for parameter in self.body.parameters()}
        own = [*self.model.parameters(recurse=False)]
        own += [parameter for name in self._children for parameter in self.model.get_submodule(name).parameters()]
        outside = list({id(parameter): parameter for parameter in own if id(parameter) not in inside}.values())
        tied = [p for p in self.model.get_output_embeddings().parameters() if id(p) in inside]
        return [parameter for parameter in (*outside, *tied) if parameter.requires_grad]

    @contextmanager
    def capture(self) -> Iterator[dict[str, torch.Tensor]]:
        """Capture the final states of a forward that runs inside the context, sparing it the logits.

        Yields:
            A dictionary that gets `"states"`, (B, T, D). The head sees the first position only.
        """
        captured: dict[str, torch.Tensor] = {}

        def keep(
            body: nn.Module, args: tuple[Any, ...], output: ModelOutput | tuple[Any, ...]
        ) -> ModelOutput | tuple[Any, ...]:
            captured["states"] = output[0]
            first = output[0][:, :1]
            self._body_output = _with_states(output, first.detach())
            return _with_states(output, first)

        handle = self.body.register_forward_hook(keep)
        try:
            yield captured
        finally:
            handle.remove()

    def reads(self, names: Collection[str]) -> bool:
        """Whether any of these inputs of its model goes past the body."""
        return bool(forward_parameters(self.model).keys() & set(names) - forward_parameters(self.body).keys())

    def final_states(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor]:
        """What enters the head in a forward of its model, (B, T, D), without the logits."""
        with self.capture() as captured:
            self.model(**inputs)
        return (captured["states"],)

    def outputs(self, states: torch.Tensor, labels: torch.Tensor | None = None) -> ModelOutput:
        """What the model returns for some positions, its own loss on labels included.

        Args:
            states: (N, D), from `capture`.
            labels: (N,) of the same positions.
        """
        # Gradients of a head in float16 are scaled in float32 on their way out of it (`GradientScale`).
        dtype = self.model.get_output_embeddings().weight.dtype
        output = _with_states(self._body_output, states[None].to(dtype if dtype == torch.float16 else states.dtype))
        inputs = {self.model.main_input_name: _no_tokens(states)}
        if labels is not None:
            inputs["labels"] = labels[None]
        with replaced_forward(self.body, lambda *args, **kwargs: output):
            return self.model(**inputs)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """The logits of some positions.

        Args:
            states: (N, D), in any order, from `capture`.

        Returns:
            (N, V), as the model would return them.
        """
        return main_outputs(self.outputs(states))[0][0]


@contextmanager
def without_logits(*heads: Head | None) -> Iterator[None]:
    """Spare forwards that run inside the context the logits of all but one position, where heads allow it."""
    with ExitStack() as stack:
        for head in heads:
            if head is not None:
                stack.enter_context(head.capture())
        yield


def find_head(model: PreTrainedModel) -> Head | None:
    """The head of a model whose body can be skipped exactly, or `None`; tested on a dummy batch."""
    embeddings = model.get_output_embeddings()
    body = model.base_model
    if embeddings is None or body is model or any(module is embeddings for module in body.modules()):
        return None
    head = Head(model)
    try:
        with in_eval_mode(model), torch.no_grad():
            inputs = dummy_inputs(model, batch_size=1)
            logits = main_outputs(model(**inputs))[0]
            with head.capture() as captured:
                model(**inputs)
            alone = head(captured["states"][0])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        return None
    exact = alone.shape == logits[0].shape and torch.allclose(alone, logits[0], rtol=1e-4, atol=1e-5)
    return head if exact else None


def _with_states(output: ModelOutput | tuple[Any, ...], states: torch.Tensor) -> ModelOutput | tuple[Any, ...]:
    if not isinstance(output, ModelOutput):
        return (states, *output[1:])
    output = copy.copy(output)
    output[next(iter(output))] = states
    return output


def _no_tokens(states: torch.Tensor) -> torch.Tensor:
    """Stand-in for the input ids, which the skipped body does not look at."""
    return torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
