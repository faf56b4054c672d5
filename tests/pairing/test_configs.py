"""Two configs that make different things of one input are refused, or nothing is shared between the models."""

import copy

import pytest
import transformers

from hf_blockkd import BlockwiseDistillTrainer
from hf_blockkd.pairing.configs import check_tokens, same_beginning

from ..helpers import tiny_models as tiny
from ..helpers.training import make_trainer, text_rows


def tiny_llama(**config):
    return tiny.tiny_llama("SequenceClassification", num_labels=tiny.LABELS, **config)


def tiny_bart(**config):
    fields = tiny.tiny_bart().config.to_diff_dict() | config
    return tiny.scrambled(transformers.BartForSequenceClassification(transformers.BartConfig(**fields))).eval()


@pytest.mark.parametrize(
    ("build", "field", "ours", "theirs"),
    [
        (tiny_llama, "pad_token_id", 0, 5),
        (tiny_llama, "pad_token_id", 0, None),
        (lambda **config: tiny.tiny_gpt2("SequenceClassification", **config), "pad_token_id", None, 2),
        (tiny_bart, "eos_token_id", 2, 3),
        (tiny.tiny_bart, "decoder_start_token_id", 2, 1),
        (tiny.tiny_t5, "pad_token_id", 0, 1),
    ],
)
def test_models_that_look_for_different_tokens_are_refused(build, field, ours, theirs):
    student, teacher = build(**{field: ours}), build(**{field: theirs})
    before = copy.deepcopy((student.config, teacher.config))
    with pytest.raises(
        ValueError, match=f"`{field}` is {ours} in the config of the student .* and {theirs} in that of"
    ):
        check_tokens(student, teacher)
    assert (student.config.to_dict(), teacher.config.to_dict()) == tuple(one.to_dict() for one in before)


@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (tiny_llama, {"eos_token_id": 3, "bos_token_id": 4}),
        (tiny.tiny_llama, {"pad_token_id": 5, "eos_token_id": 3}),
        (tiny.tiny_bert, {"pad_token_id": 5}),
        (tiny.tiny_vit, {"num_hidden_layers": 2}),
    ],
)
def test_tokens_that_no_forward_looks_for_may_differ(build, fields):
    assert check_tokens(build(), build(**fields)) is None


def test_one_that_the_stock_trainer_sets_to_its_tokenizers_is_seen(tmp_path):
    trainer = make_trainer(tmp_path, tiny_llama(), tiny_llama(), text_rows(), max_steps=1)
    again = BlockwiseDistillTrainer(
        model=tiny_llama(),
        teacher_model=tiny_llama(),
        args=trainer.args,
        train_dataset=text_rows(),
        processing_class=tiny.word_tokenizer(tiny.VOCABULARY, pad_token="w7"),
    )
    with pytest.raises(ValueError, match=r"`pad_token_id` is 7 in the config of the student .* and 0 in that of the"):
        again.train()
    assert again.state.global_step == 0


MISTRAL = {"sliding_window": 40}


@pytest.mark.parametrize(
    ("build", "ours", "theirs", "agree"),
    [
        (tiny.tiny_mistral, MISTRAL, MISTRAL, True),
        (tiny.tiny_mistral, MISTRAL, {"sliding_window": 4}, False),
        (tiny.tiny_llama, {}, {"max_position_embeddings": 20}, False),
        (tiny.tiny_llama, {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}, False),
        (tiny.tiny_llama, {"pad_token_id": 3, "eos_token_id": 4}, {"use_cache": False, "attention_dropout": 0.1}, True),
        # A list for every layer is compared as far as layers are shared.
        (tiny.tiny_qwen3, {"num_hidden_layers": 2}, {}, True),
        (tiny.tiny_qwen3, {"num_hidden_layers": 2}, {"sliding_window": 5}, False),
        # Equal by chance to the numbers of layers, but no such number.
        (tiny.tiny_mistral, {"num_hidden_layers": 2, "sliding_window": 2}, {"sliding_window": 3}, False),
        (tiny.tiny_bert, {"num_labels": 3}, {"hidden_dropout_prob": 0.3, "classifier_dropout": 0.2}, True),
        (tiny.tiny_bart, {"decoder_layerdrop": 0.1}, {"decoder_layerdrop": 0.1}, False),
        (tiny.tiny_bart, {}, {"decoder_layerdrop": 0.1}, True),
        (tiny.tiny_clip, {}, {"layer_norm_eps": 1e-3}, False),
    ],
)
def test_first_layers_are_alike_if_all_fields_are_that_reach_them(build, ours, theirs, agree):
    student, teacher = build(**ours), build(**theirs)
    depths = ours.get("num_hidden_layers", tiny.LAYERS), tiny.LAYERS
    assert same_beginning(student, teacher, depths, 1) is agree


def test_other_kinds_of_later_layers_leave_the_first_alike():
    full, sliding = "full_attention", "sliding_attention"
    teacher = tiny.tiny_qwen3(layer_types=[full, sliding, full])
    student = tiny.tiny_qwen3(layer_types=[full, sliding, sliding])
    assert same_beginning(student, teacher, (3, 3), 2)
    assert not same_beginning(student, teacher, (3, 3), 3)
