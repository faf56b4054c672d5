r"""Distil a language model: train or load a teacher, then a student alone, with plain KD, and with Block-KD.

accelerate launch examples/distill_lm.py                                # a Llama on WikiText, from the hub
accelerate launch examples/distill_lm.py --train_file novels.txt              # the last tenth is held out
accelerate launch examples/distill_lm.py --masked --train_teacher false \
    --teacher google-bert/bert-base-uncased --student_layers 6
"""

from __future__ import annotations

import json
import math

from arguments import ModelArguments, parse_arguments, read_fields
from comparison import compare
from launching import run, say
from lm_data import LMDataArguments, load_lines, make_tokenizer, pack
from results import Metric
from task import Task, load_teacher
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    default_data_collator,
    set_seed,
)


def main() -> None:
    # Perplexity needs the loss alone, and the logits of a whole evaluation set would not fit.
    script, data, args = parse_arguments(__file__, LMDataArguments, prediction_loss_only=True)
    compare(script, data, args, load_task(script, data))


def load_task(script: ModelArguments, data: LMDataArguments) -> Task:
    auto_class = AutoModelForMaskedLM if data.masked else AutoModelForCausalLM
    train_lines, eval_lines = load_lines(data)
    set_seed(0)
    if script.teacher is None:
        tokenizer = make_tokenizer(train_lines, data.vocab_size, data.masked)
        fields = read_fields("teacher_config", script.teacher_config)
        model_type = fields.pop("model_type", "bert" if data.masked else "llama")
        read_fields("teacher_config", json.dumps(fields), AutoConfig.for_model(model_type))
        config = AutoConfig.for_model(
            model_type,
            **fields,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            max_position_embeddings=data.block_size,
        )
        teacher = auto_class.from_config(config)
    else:
        tokenizer = AutoTokenizer.from_pretrained(script.teacher, trust_remote_code=False)
        teacher = load_teacher(script, auto_class)
    train_set, eval_set = (pack(lines, tokenizer, data.block_size) for lines in (train_lines, eval_lines))
    if data.max_train_samples is not None and data.max_train_samples < len(train_set):
        train_set = train_set.shuffle(seed=0).select(range(data.max_train_samples))
    say(f"{len(train_set)} blocks of {data.block_size} tokens to train on, {len(eval_set)} to evaluate on.")

    return Task(
        teacher,
        auto_class,
        train_set,
        eval_set,
        Metric("perplexity", lambda metrics, prefix: math.exp(metrics[f"{prefix}_loss"]), ".2f", lower_is_better=True),
        {
            "data_collator": DataCollatorForLanguageModeling(tokenizer) if data.masked else default_data_collator,
            "processing_class": tokenizer,
        },
    )


if __name__ == "__main__":
    run(main)
