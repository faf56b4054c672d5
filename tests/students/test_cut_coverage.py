"""Students of a spread of families, each built from its default config alone; the slow test takes all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest
import torch

from hf_blockkd import make_student
from hf_blockkd.routing.dummy_inputs import dummy_inputs

from ..examples.test_tiny_configs import BENCHMARKS, load
from ..helpers.tiny_models import tiny_waves

load("coverage")  # the other one imports it
cut_coverage = load("cut_coverage")

FAMILIES = {
    "gpt_neox": ("CAUSAL_LM", ["hidden_size"]),  # queries, keys and values of each head together
    "qwen3_moe": ("CAUSAL_LM", ["hidden_size"]),  # experts in one tensor
    "jamba": ("CAUSAL_LM", ["hidden_size"]),  # state space, attention and experts
    "mamba": ("CAUSAL_LM", ["hidden_size"]),  # no heads
    "pegasus": ("SEQ_TO_SEQ_CAUSAL_LM", ["hidden_size"]),
    "convnext": ("IMAGE_CLASSIFICATION", ["hidden_sizes"]),
    "mpt": ("CAUSAL_LM", ["hidden_size", "num_attention_heads"]),  # slopes hang on the number of heads
    "falcon": ("CAUSAL_LM", ["hidden_size"]),  # keys that are looked up by a number in the code
    "xlnet": ("CAUSAL_LM", ["d_inner"]),  # positions as wide as the states, computed of the config
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_cut_in_depth_and_in_width(model_type):
    task, sizes = FAMILIES[model_type]
    row = cut_coverage.examine(task, model_type)
    assert (row["status"], row["sizes"], row["new"]) == ("both", sizes, [])


@pytest.mark.parametrize("family", ["Wav2Vec2", "Hubert"])
def test_models_of_sounds_are_cut_in_width_and_their_normalised_weights_with_them(family):
    teacher = tiny_waves(family)
    student = make_student(teacher, hidden_size=8, num_attention_heads=1, channels="weights")
    # What stands in for masked frames of training is all that no clean forward reads.
    assert cut_coverage.new_tensors(teacher, student) == [f"{family.lower()}.masked_spec_embed"]
    assert student(**dummy_inputs(student)).logits.isfinite().all()


def test_what_cannot_be_cut_says_why():
    row = cut_coverage.examine("MASKED_LM", "xlm")
    assert row["status"] == "refused"
    assert "keeps the parts of each layer in lists of their own" in row["reason"]


def test_an_entry_that_is_not_the_teachers_is_seen():
    model = load("tiny_configs").tiny_model("CAUSAL_LM", "llama")
    student = make_student(model, hidden_size=48, channels="weights")
    assert cut_coverage.new_tensors(model, student) == []
    with torch.no_grad():
        student.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    assert cut_coverage.new_tensors(model, student) == ["model.layers.1.mlp.up_proj.weight"]
    assert cut_coverage.is_read(student, "model.layers.1.mlp.up_proj.weight")


def test_the_table_counts_sizes():
    rows = [
        {"task": "CAUSAL_LM", "model_type": "a", "status": "both", "sizes": ["hidden_size"], "new": ["b.weight"]},
        {"task": "CAUSAL_LM", "model_type": "c", "status": "depth", "reason": "no width"},
    ]
    lines = cut_coverage.table(rows).splitlines()
    assert "| causal lm | 2 | 1 | 0 | 1 | 0 | 0 | 0 |" in lines
    assert "- narrower by `hidden_size`: 1" in lines
    assert "- with tensors outside the layers that begin anew: 1, a (b.weight)" in lines
    assert "- c (causal lm): no width" in lines


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_pair_of_the_auto_mappings_is_cut_or_says_why_not(tmp_path):
    subprocess.run([sys.executable, BENCHMARKS / "cut_coverage.py", "--output_dir", tmp_path], check=True)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    counts = Counter(row["status"] for row in rows)
    assert counts["both"] + counts["width"] >= 450
    assert not [row for row in rows if row["status"] == "broken"]
