"""Models put together by hand from their parts: what enters the first layer, how a layer is called, what follows them.

Nothing here hooks a model or runs its own forward (the encoder of an encoder-decoder apart).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Walk:
    """A model that is about to read a batch.

    Attributes:
        states: What enters the first layer.
        layers: The stack.
        call: Runs one layer on states.
        head: From what leaves the last layer to the logits.
    """

    states: Tensor
    layers: nn.ModuleList
    call: Callable[[nn.Module, Tensor], Tensor]
    head: Callable[[Tensor], Tensor]


def closed(mask: Tensor) -> Tensor:
    """What is added to the scores of attention where 0 of the mask forbids it."""
    return (1.0 - mask.float()) * torch.finfo(torch.float32).min


def walk_bert(model: nn.Module, batch: dict[str, Tensor]) -> Walk:
    ids, mask = (batch[name].flatten(0, -2) for name in ("input_ids", "attention_mask"))

    def head(states: Tensor) -> Tensor:
        if hasattr(model, "cls"):
            return model.cls(states)
        if hasattr(model, "qa_outputs"):
            return torch.cat(model.qa_outputs(states).unbind(-1))
        if model.bert.pooler is None:
            return model.classifier(states)
        logits = model.classifier(torch.tanh(model.bert.pooler.dense(states[:, 0])))
        return logits.view(batch["input_ids"].shape[:-1]) if batch["input_ids"].ndim == 3 else logits

    scores = closed(mask)[:, None, None]
    return Walk(model.bert.embeddings(ids), model.bert.encoder.layer, lambda layer, x: layer(x, scores), head)


def walk_llama(model: nn.Module, batch: dict[str, Tensor]) -> Walk:
    states, length = model.model.embed_tokens(batch["input_ids"]), batch["input_ids"].shape[1]
    rotary = model.model.rotary_emb(states, torch.arange(length)[None])
    seen = torch.ones(length, length).tril() * batch["attention_mask"][:, None]
    scores = closed(seen)[:, None]

    def head(states: Tensor) -> Tensor:
        states = model.model.norm(states)
        if hasattr(model, "lm_head"):
            return model.lm_head(states)
        last = batch["attention_mask"].sum(-1) - 1
        return model.score(states[torch.arange(len(last)), last])

    def call(layer: nn.Module, states: Tensor) -> Tensor:
        return layer(states, attention_mask=scores, position_embeddings=rotary)

    return Walk(states, model.model.layers, call, head)


def walk_t5(model: nn.Module, batch: dict[str, Tensor]) -> Walk:
    """The decoder, whose tokens are the labels, moved to the right by one; the encoder is as ever."""
    encoded = model.encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    length = batch["labels"].shape[1]
    tokens = F.pad(batch["labels"][:, :-1], (1, 0), value=0).clamp(min=0)
    decoder = model.decoder
    own, cross = closed(torch.ones(length, length).tril())[None, None], closed(batch["attention_mask"])[:, None, None]
    bias = decoder.block[0].layer[0].SelfAttention.compute_bias(length, length)

    def call(layer: nn.Module, states: Tensor) -> Tensor:
        return layer(states, own, bias, encoded, cross)[0]

    def head(states: Tensor) -> Tensor:
        return model.lm_head(decoder.final_layer_norm(states) * model.config.d_model**-0.5)

    return Walk(decoder.embed_tokens(tokens), decoder.block, call, head)


def walk(model: nn.Module, batch: dict[str, Tensor]) -> Walk:
    return {"bert": walk_bert, "llama": walk_llama, "t5": walk_t5}[model.config.model_type](model, batch)
