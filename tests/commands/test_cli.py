"""The console command: what it prints, its exit codes, and one sentence instead of a traceback."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Pix2StructConfig, PreTrainedModel, ViTConfig

import hf_blockkd
from hf_blockkd.commands.cli import COMMANDS, main
from hf_blockkd.models.loading import has_no_weights, load_model

from ..helpers.tiny_models import tiny_gpt2, tiny_vit
from ..helpers.training import image_rows, make_trainer

# ---- Loading ----


def test_a_folder_with_weights_gives_these_weights(tmp_path):
    model = saved(tiny_vit(), tmp_path)
    assert all(
        torch.equal(value, load_model(str(tmp_path)).state_dict()[name]) for name, value in model.state_dict().items()
    )


def test_a_folder_with_a_config_alone_is_no_model_unless_random_weights_are_asked_for(tmp_path):
    model = saved_config(tiny_gpt2(), tmp_path)
    assert has_no_weights(str(tmp_path))
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(tmp_path))
    loaded = load_model(str(tmp_path), config_only=True)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert not torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_config_only_leaves_weights_alone(tmp_path):
    model = saved(tiny_vit(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    loaded = load_model(str(tmp_path), config_only=True)
    assert loaded.classifier.weight.shape == model.classifier.weight.shape
    assert not torch.equal(loaded.classifier.weight, model.classifier.weight)


# ---- check ----


def test_check_prints_what_it_found(tmp_path, capsys):
    saved(tiny_vit(num_hidden_layers=4), tmp_path)
    assert main(["check", str(tmp_path)]) == 0
    printed = lines_of(capsys.readouterr().out)
    assert printed["layers path"] == "vit.layers"
    assert printed["layers"] == "4"
    assert printed["technique"] == "own forward"
    assert float(printed["max abs error"]) <= 1e-6
    assert 0 <= int(printed["worst depth"]) <= 4


@pytest.mark.parametrize("options", [[], ["--config_only"]])
def test_check_needs_no_weights(tmp_path, capsys, options):
    saved_config(tiny_gpt2(), tmp_path)
    assert main(["check", str(tmp_path), *options]) == 0
    assert lines_of(capsys.readouterr().out)["layers path"] == "transformer.h"


def test_check_takes_a_layers_path(tmp_path, capsys):
    saved(tiny_vit(), tmp_path)
    assert main(["check", str(tmp_path), "--layers_path", "vit.layers"]) == 0
    assert refused(capsys, ["check", str(tmp_path), "--layers_path", "vit.blocks"]).startswith(
        "hf-blockkd: The layers path 'vit.blocks' of ViTForImageClassification names nothing"
    )


def test_check_refuses_a_model_without_layers(tmp_path, capsys):
    saved_config(tiny_vit(num_hidden_layers=0), tmp_path)
    assert "ViTForImageClassification has no nn.ModuleList" in refused(capsys, ["check", str(tmp_path)])


def test_check_refuses_a_model_of_inputs_of_another_kind(tmp_path, capsys):
    text = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "d_kv": 4, "d_ff": 8, "vocab_size": 32}
    vision = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "d_kv": 4, "d_ff": 8}
    config = Pix2StructConfig(text_config=text, vision_config={**vision, "patch_embed_hidden_size": 8, "seq_len": 8})
    config.architectures = ["Pix2StructForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    message = refused(capsys, ["check", str(tmp_path)])
    assert "takes 'flattened_patches', of which no example can be made" in message


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "owner/model"])
def test_a_name_that_cannot_be_found_is_refused(capsys, name):
    assert refused(capsys, ["check", name])


def test_a_config_without_an_architecture_is_refused(tmp_path, capsys):
    ViTConfig().save_pretrained(tmp_path)
    assert "in `architectures`" in refused(capsys, ["check", str(tmp_path)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "nonesuch"}, "has the model type 'nonesuch', which transformers .* correct `model_type`"),
        ({}, "Should have a `model_type` key"),
        ({"model_type": "bert", "hidden_size": 30, "num_attention_heads": 4}, r"hidden size \(30\) is not a multiple"),
        ({"model_type": "lfm2_moe"}, "builds no BertForMaskedLM .* complete its fields"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(tmp_path, capsys, fields, message):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForMaskedLM"], **fields}))
    assert re.search(message, refused(capsys, ["check", str(tmp_path)]))


def test_a_model_that_does_not_run_is_refused_with_its_own_words(tmp_path, capsys):
    saved_config(tiny_gpt2("SequenceClassification", pad_token_id=None), tmp_path)
    message = refused(capsys, ["check", str(tmp_path)])
    assert "GPT2ForSequenceClassification does not run on made-up input_ids and attention_mask (" in message
    assert "no padding token is defined); correct its config, or pass `inputs` of your own" in message


@pytest.mark.parametrize(("path", "found"), [("vit", "a ViTModel"), ("vit.layers.0", "a ViTLayer"), ("x", "nothing")])
def test_a_layers_path_that_is_no_list_is_refused(tmp_path, capsys, path, found):
    saved(tiny_vit(), tmp_path)
    message = refused(capsys, ["check", str(tmp_path), "--layers_path", path])
    assert f"{path!r} of ViTForImageClassification names {found} instead of a non-empty nn.ModuleList" in message
    assert "vit.layers" in message


def test_the_module_runs_as_a_command(tmp_path):
    saved_config(tiny_gpt2(), tmp_path)
    command = [sys.executable, "-m", "hf_blockkd.commands.cli", "check"]
    passed = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (passed.returncode, passed.stderr) == (0, "")
    assert "transformer.h" in passed.stdout

    failed = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert re.fullmatch(r"hf-blockkd: There is no folder '.*none'; .*\n", failed.stderr)


def test_help_waits_for_no_library_and_names_every_command():
    imports = "import sys", "from hf_blockkd.commands.cli import main"
    lines = *imports, "try: main({argv})", "finally: print(*sys.modules)"
    # Of a plan, the settings of a run are a class of transformers.
    helps = [([name, "--help"], 0) for name in COMMANDS if name != "plan"]
    for argv, code in ((["--help"], 0), (["kut", "a"], 2), (["cut", "a", "--ouput", "b"], 2), *helps):
        command = [sys.executable, "-c", "\n".join(lines).format(argv=argv)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert not {"torch", "transformers", "datasets", "numpy"} & set(done.stdout.splitlines()[-1].split())
        said = done.stdout if code == 0 else done.stderr
        if argv[0] in COMMANDS:
            assert f"hf-blockkd {argv[0]}" in said
        else:
            assert all(name in said for name in COMMANDS)


def test_the_package_lists_its_names_before_it_has_imported_them():
    command = [sys.executable, "-c", "import hf_blockkd; print(*dir(hf_blockkd))"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert set(hf_blockkd.__all__) <= set(listed)


# ---- plan ----


def test_plan_prints_the_cut_and_the_costs(tmp_path, capsys):
    pair = saved_pair(tmp_path)
    options = ["--student_boundaries", "1", "2", "--teacher_boundaries", "3", "4", "--stepping_stones", "1"]
    assert main(["plan", *pair, *options, "--connector", "mlp", "--batch_size", "3"]) == 0
    printed = capsys.readouterr().out
    assert "student 1 layer -> teacher 1 layer" in printed
    assert "mlp 16 -> 32" in printed
    assert "batch size 3, examples of 1 x 8 x 8" in printed
    assert flops(printed, "plain KD") < flops(printed, r"sampled stones \(1 of 2\)") < flops(printed, "all stones")
    assert flops(printed, "plain KD") < flops(printed, r"stones 1 \*")


def test_plan_scales_with_the_length_of_texts(tmp_path, capsys):
    for name in ("teacher", "student"):
        saved_config(tiny_gpt2(), tmp_path / name)
    pair = ["--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "student"), "--num_blocks", "2"]
    costs = []
    for length in ("8", "16"):
        assert main(["plan", *pair, "--sequence_length", length]) == 0
        printed = capsys.readouterr().out
        assert f"examples of {length} tokens" in printed
        costs.append(flops(printed, "plain KD"))
    assert costs[1] > 2 * costs[0]


def test_plan_cuts_into_as_many_blocks_as_both_models_have_layers(tmp_path, capsys):
    pair = saved_pair(tmp_path)
    capsys.readouterr()
    assert main(["plan", *pair]) == 0
    out, err = capsys.readouterr()
    assert "student 2 layers -> teacher head" in out
    assert err == ""


def test_plan_takes_every_setting_of_a_run(tmp_path, capsys):
    pair = saved_pair(tmp_path)
    asked = {
        "plain KD": ["--objective", "kd", "--temperature", "4"],
        "states, no stones": ["--state_weight", "2", "--connector-start", "random", "--stone_weight", "0"],
        "ladder": ["--objective", "ladder", "--eval_stepping_stones"],
        "all stones": ["--stepping_stones", "last_two", "--teacher_cache", "folder"],
    }
    for chosen, options in asked.items():
        assert main(["plan", *pair, *options]) == 0
        assert re.findall(r"^(.+?) \* +\d", capsys.readouterr().out, re.MULTILINE) == [chosen]


def test_plan_estimates_a_run_on_gpus_from_configs_alone(tmp_path, capsys):
    for name in ("teacher", "student"):
        saved_config(tiny_gpt2(), tmp_path / name)
    pair = ["--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "student")]
    assert main(["plan", *pair, "--gpus", "8", "--gpu", "h200", "--tokens", "1e9", "--sequence_length", "12"]) == 0
    printed = capsys.readouterr().out
    assert "H200, 8 GPUs" in printed
    assert "the default" in printed


def test_plan_refuses_what_training_would_refuse(tmp_path, capsys):
    pair = saved_pair(tmp_path)
    assert "`num_blocks` is 9" in refused(capsys, ["plan", *pair, "--num_blocks", "9"])
    assert "`stepping_stones` is 'some'" in refused(capsys, ["plan", *pair, "--stepping_stones", "some"])
    assert "`batch_size` must be" in refused(capsys, ["plan", *pair, "--num_blocks", "2", "--batch_size", "0"])


def test_arguments_that_are_unknown_end_with_code_2(capsys):
    for argv in ([], ["plan"], ["check"], ["plan", "--teacher", "a", "--student", "b", "--connector", "conv"]):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "hf-blockkd",
        "hf-blockkd plan",
        "hf-blockkd check",
        "hf-blockkd plan",
    ]


@pytest.mark.parametrize(
    ("argv", "advice"),
    [
        (["plan", "--techer", "a"], "hf-blockkd plan: there is no flag --techer; did you mean --teacher?"),
        (["cut", "a", "--ouput=b"], "hf-blockkd cut: there is no flag --ouput; did you mean --output?"),
        (["report", "a", "--zzz"], "hf-blockkd report: there is no flag --zzz; see --help."),
    ],
)
def test_a_mistyped_flag_is_answered_with_the_nearest_one(argv, advice, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"{advice}\n"


def test_a_flag_may_be_cut_short(tmp_path):
    saved(tiny_vit(), tmp_path / "vit")
    assert main(["check", str(tmp_path / "vit"), "--layers", "vit.layers"]) == 0


# ---- report ----


def test_report_draws_a_run_and_prints_the_paths(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path / "run",
        tiny_vit(),
        tiny_vit(),
        image_rows(),
        eval_dataset=image_rows(),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=2,
        eval_stepping_stones=True,
    )
    trainer.train()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "pictures")]) == 0
    names = ("losses.png", "path.png", "blocks.png", "map.png", "report.html")
    *pictures, page = [str(tmp_path / "pictures" / name) for name in names]
    assert capsys.readouterr().out.splitlines() == [*pictures, page]
    assert all(Path(picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert Path(page).read_text().startswith("<!doctype html>")

    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert main(["report", str(checkpoint), "--metric", "loss"]) == 0
    assert (checkpoint / "path.png").is_file()
    capsys.readouterr()
    assert main(["report", str(checkpoint), "--metric", "accuracy"]) == 0
    assert "path.png is not drawn: `metric` is 'accuracy'" in capsys.readouterr().err


def test_report_draws_every_run_of_a_comparison(tmp_path, capsys):
    for name in ("kd/seed_0", "block_kd/seed_0/checkpoint-2"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 0.5}]}')
    assert main(["report", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    runs = [tmp_path / name / "seed_0" for name in ("block_kd", "kd")]
    assert out.splitlines() == [*(str(run / "losses.png") for run in runs), str(tmp_path / "report.html")]
    assert err == ""
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "pictures")]) == 0
    assert (tmp_path / "pictures" / "kd" / "seed_0" / "losses.png").is_file()
    capsys.readouterr()
    assert main(["report", *(str(run) for run in runs)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "report.html")


def test_report_says_what_is_missing(tmp_path, capsys):
    assert "no trainer_state.json" in refused(capsys, ["report", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    assert main(["report", str(tmp_path)]) == 1
    sentences = capsys.readouterr().err.splitlines()
    assert [sentence.split(":")[0] for sentence in sentences] == [f"{tmp_path / 'losses.png'} is not drawn"]

    # What was asked for, and is not there.
    (tmp_path / "training_args.json").write_text('{"eval_stepping_stones": true}')
    assert main(["report", str(tmp_path)]) == 1
    sentences = capsys.readouterr().err.splitlines()
    names = ("losses.png", "path.png", "blocks.png")
    assert [sentence.split(":")[0] for sentence in sentences] == [f"{tmp_path / name} is not drawn" for name in names]


# ---- Helpers ----


def saved(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return model


def saved_config(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return model


def saved_pair(folder: Path) -> list[str]:
    saved(tiny_vit(num_hidden_layers=2), folder / "student")
    saved(tiny_vit(hidden_size=32, num_hidden_layers=4), folder / "teacher")
    return ["--teacher", str(folder / "teacher"), "--student", str(folder / "student")]


def lines_of(printed: str) -> dict[str, str]:
    return dict(re.split(r"\s{2,}", line) for line in printed.splitlines())


def flops(printed: str, setting: str) -> float:
    number, prefix = re.search(rf"^{setting}\s+([\d.]+) ([kMG])", printed, re.MULTILINE).groups()
    return float(number) * {"k": 1e3, "M": 1e6, "G": 1e9}[prefix]


def refused(capsys, argv: list[str]) -> str:
    """One line on stderr, nothing on stdout, exit code 1."""
    capsys.readouterr()
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err
