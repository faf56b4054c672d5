"""Which settings of a run are told, and what of its teacher it kept."""

import json

from hf_blockkd import BlockwiseDistillConfig
from hf_blockkd.commands.report.runs import Run
from hf_blockkd.commands.report.settings import changed_settings, weights_of
from hf_blockkd.commands.report.structure import block_rows, cut_rows
from hf_blockkd.models.cut import Cut
from hf_blockkd.pairing.blocks import BlockMap
from hf_blockkd.saving.settings import RESOLVED_NAME

from .helpers import write_run


def test_what_differs_from_the_defaults_is_told_ours_apart(tmp_path):
    config = BlockwiseDistillConfig(str(tmp_path), use_cpu=True, temperature=3.0, learning_rate=0.1, num_blocks=4)
    changed = changed_settings(json.loads(config.to_json_string()))
    assert changed == {"Distillation": {"temperature": 3.0}, "Training": {"learning_rate": 0.1}}


def test_a_run_as_by_default_has_nothing_to_tell(tmp_path):
    config = BlockwiseDistillConfig(str(tmp_path), use_cpu=True)
    assert changed_settings(json.loads(config.to_json_string())) == {"Distillation": {}, "Training": {}}


def test_the_weight_of_states_is_what_the_run_made_of_it(tmp_path):
    for resolved, words in (
        ({"state_weight": 5.0, "stone_schedule": "linear"}, "5 to 0 x "),
        ({"state_weight": 0.5, "stone_schedule": "constant"}, "0.5 x "),
        ({}, "state_weight x "),
    ):
        run = write_run(tmp_path, {"loss": 1.0}, state_weight=None)
        (run / RESOLVED_NAME).write_text(json.dumps(resolved))
        assert weights_of(Run.read(run))["loss_state"] == words


def test_runs_of_other_trainers_say_nothing_of_their_losses(tmp_path):
    assert weights_of(Run.read(write_run(tmp_path, {"loss": 1.0}))) == {}


def test_what_is_cut_the_same_in_all_layers_is_told_once():
    axes = [{"tensor": f"vit.layers.{i}.mlp.weight", "dim": 0, "size": 8, "kept": [0, 5], "scores": []} for i in (0, 3)]
    axes.append({"tensor": "vit.layers.4.mlp.weight", "dim": 0, "size": 8, "kept": [1, 2, 3], "scores": []})
    assert cut_rows(Cut([0, 3, 4], 6, axes=axes)) == [
        ("layers", 3, 6),
        ("vit.layers.*.mlp.weight, dimension 0", 2, 8),
        ("vit.layers.*.mlp.weight, dimension 0", 3, 8),
    ]


def test_the_map_is_a_table_of_four_columns():
    assert block_rows(BlockMap.even(3, 8, 3))[1] == ["2", "1", "2-4", "student 2 layers -> teacher 3 layers"]
