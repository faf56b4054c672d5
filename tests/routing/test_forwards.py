"""What a forward takes is found behind classes of a person's own, too."""

import pytest
import torch
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedModel, ViTForImageClassification

from hf_blockkd import check_routing
from hf_blockkd.routing.dummy_inputs import dummy_inputs
from hf_blockkd.routing.forwards import forward_parameters

from ..helpers.tiny_models import tiny_bert, tiny_llama, tiny_vit


class OpenBert(BertForSequenceClassification):
    def forward(self, *args, labels=None, **kw):
        return super().forward(*args, labels=labels, **kw)


class TwiceOpenBert(OpenBert):
    def forward(self, number=1, **kw):
        return super().forward(**kw)


class OpenViT(ViTForImageClassification):
    def forward(self, *args, **kw):
        return super().forward(*args, **kw)


class OpenLlama(LlamaForCausalLM):
    def forward(self, *args, labels=None, **kw):
        return super().forward(*args, labels=labels, **kw)


class ClosedLlama(LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None):
        return super().forward(input_ids, labels=labels)


class Nameless(PreTrainedModel):
    """Descends from no model of transformers."""

    config_class, main_input_name, _supports_sdpa = BertForSequenceClassification.config_class, "input_ids", True

    def forward(self, *args, **kw):
        return kw


BERT = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "labels", "kwargs"}


@pytest.mark.parametrize(
    ("own", "build", "names"),
    [
        (BertForSequenceClassification, tiny_bert, BERT),
        (OpenBert, tiny_bert, BERT),
        (TwiceOpenBert, tiny_bert, BERT | {"number"}),
        (ClosedLlama, tiny_llama, {"input_ids", "labels"}),
        (Nameless, tiny_bert, {"args", "kw"}),
    ],
)
def test_what_an_open_forward_hands_on_counts_as_taken(own, build, names):
    assert forward_parameters(own(build().config)).keys() == names


@pytest.mark.parametrize(
    ("own", "build"), [(OpenBert, tiny_bert), (TwiceOpenBert, tiny_bert), (OpenViT, tiny_vit), (OpenLlama, tiny_llama)]
)
def test_a_class_of_the_persons_own_with_an_open_forward_is_routed_as_its_base(own, build):
    plain = build()
    model = own(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    inputs, expected = dummy_inputs(model), dummy_inputs(plain)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)
    assert check_routing(model).max_abs_error == 0.0


def test_a_forward_that_names_nothing_is_refused_for_that():
    with pytest.raises(ValueError, match=r"^The forward of Nameless takes args, kw and does not name 'input_ids'"):
        dummy_inputs(Nameless(tiny_bert().config))
