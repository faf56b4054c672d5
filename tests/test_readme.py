"""What README and guide show runs: Python as written, commands as far as they can without a network."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_blockkd import BlockwiseDistillConfig
from hf_blockkd.commands.cli import main

from .helpers.tiny_models import VOCABULARY, tiny_bert, tiny_llama, tiny_vit, word_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "examples/README.md")}
README, GUIDE = PAGES.values()


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= 200


def run_script(code: str, folder: Path) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(code, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_trains_evaluates_resumes_and_reloads_in_an_empty_folder(tmp_path):
    script = blocks("python")[0]
    # The run is shortened, and nothing else is changed.
    script = script.replace("images, digits = mnist_data()", "images, digits = (part[::10] for part in mnist_data())")
    first = run_script(script, tmp_path)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "eval_accuracy" in first.stdout
    assert len(re.findall(r"'label': '\d'", first.stdout)) == 5  # the pipeline's answers
    assert (tmp_path / "student" / "final" / "model.safetensors").is_file()
    resumed = run_script(script.replace("trainer.train()", "trainer.train(resume_from_checkpoint=True)"), tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-2000:]


def test_the_script_for_texts_trains_and_evaluates_and_the_student_answers(tmp_path):
    for part in (word_tokenizer(VOCABULARY, pad_token="w1"), tiny_bert(num_labels=2, num_hidden_layers=4)):
        part.save_pretrained(tmp_path / "your-teacher")
    rows = [f"{' '.join(f'w{word}' for word in range(2, 3 + index % 7))},{index % 2}" for index in range(40)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    run = run_script(blocks("python")[1], tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "eval_accuracy" in run.stdout
    assert "'label': 'LABEL_" in run.stdout


def test_the_description_of_an_architecture_is_accepted(tmp_path):
    (description,) = (block for block in blocks("python", GUIDE) if "register_architecture" in block)
    assert run_script(description, tmp_path).returncode == 0


def test_a_student_is_healed_by_an_adapter_as_the_guide_has_it(tmp_path):
    for part in (word_tokenizer(VOCABULARY), tiny_llama()):
        part.save_pretrained(tmp_path / "your-teacher")
    (tmp_path / "novels.txt").write_text(" ".join(f"w{4 + index**2 % 50}" for index in range(8 * 20)))
    (script,) = (block for block in blocks("python", GUIDE) if "LoraConfig" in block)
    done = run_script(script.replace("128", "8").replace("127", "7"), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student" / "final").config.num_hidden_layers == 2


@pytest.mark.slow
def test_a_student_becomes_onnx_as_the_guide_has_it(tmp_path):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"install {package} to export to ONNX")
    tiny_vit().save_pretrained(tmp_path / "student" / "final")
    (export,) = (block for block in blocks("python", GUIDE) if "onnx" in block)
    done = run_script(export, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "student.onnx").is_file()


def test_every_command_of_the_console_tool_exists():
    shown = [block for page in PAGES.values() for block in blocks("bash", page)]
    lines = [line for block in shown for line in block.splitlines() if line.startswith("hf-blockkd ")]
    ours = [shlex.split(line, comments=True) for line in lines]
    assert {command[1] for command in ours} == {"check", "plan", "cut", "distill", "report"}
    for command in ours:
        with pytest.raises(SystemExit) as stop:
            main([command[1], "--help"])
        assert stop.value.code == 0


def test_the_table_of_settings_is_complete_and_has_the_true_defaults():
    stock = {field.name for field in fields(TrainingArguments)}
    own = {field.name: field.default for field in fields(BlockwiseDistillConfig) if field.name not in stock}
    table = GUIDE[GUIDE.index("## Settings") : GUIDE.index("## Before you train")]
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \|", table, flags=re.MULTILINE)
    shown = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    assert shown.keys() == own.keys()
    for name, default in own.items():
        if default is not None:
            assert shown[name].strip("`").strip('"') == str(default)


def test_every_message_that_is_explained_is_one_of_ours():
    table = README[README.index("## When something stops") : README.index("## More")]
    code = "\n".join(
        path.read_text("utf-8") for folder in ("hf_blockkd", "examples") for path in (ROOT / folder).rglob("*.py")
    )
    code = re.sub(r"""["']\s+f?["']""", "", code).replace("`", "")  # of literals that go on in the next line
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) > 5
    for message in re.findall("`(.*?)`", "".join(rows)):
        assert message in code, message


@pytest.mark.parametrize("name", [*PAGES, "examples/benchmarks/README.md", "hf_blockkd/README.md"])
def test_its_local_links_and_pictures_exist(name):
    folder, text = (ROOT / name).parent, (ROOT / name).read_text("utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        page = folder / path if path else ROOT / name
        assert page.exists(), target
        headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, target
