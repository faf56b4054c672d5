"""The recipe of each situation runs for two steps, by the example that it names."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from transformers import ViTConfig, ViTForImageClassification
from transformers import ViTImageProcessorPil as Processor

from hf_blockkd import load_stepping_stone

from ..helpers.images import SHAPE, draw
from ..helpers.tiny_models import VOCABULARY, tiny_bert, tiny_llama, word_tokenizer

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def images(folder: Path) -> list[str]:
    draw(folder / "images", [(8, 8)] * 10)
    classes = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    teacher = ViTForImageClassification(ViTConfig(image_size=8, num_channels=1, **SHAPE, **classes))
    teacher.save_pretrained(folder / "teacher")
    Processor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder / "teacher")
    return ["--dataset", "images", "--train_teacher", "false"]


def texts(folder: Path) -> list[str]:
    for part in (tiny_bert(num_labels=2), word_tokenizer(VOCABULARY, pad_token="w1", mask_token="w2")):
        part.save_pretrained(folder / "teacher")
    rows = [f"{' '.join(f'w{word}' for word in range(2, 4 + index % 7))},{index % 2}" for index in range(40)]
    (folder / "texts.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    return ["--train_file", "texts.csv", "--train_teacher", "false"]


def running_text(folder: Path) -> list[str]:
    for part in (tiny_llama(), word_tokenizer(VOCABULARY, pad_token="w1")):
        part.save_pretrained(folder / "teacher")
    lines = [" ".join(f"w{(line * word) % VOCABULARY}" for word in range(1, 20)) for line in range(60)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    return ["--train_file", "text.txt", "--block_size", "16"]


DATA = {"distill_vit": images, "distill_text_classification": texts, "distill_lm": running_text}


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_it_runs_by_the_command_that_it_shows(config, tmp_path, monkeypatch):
    line = next(line for line in config.read_text().splitlines() if "accelerate launch" in line)
    script, shown = line.partition("accelerate launch ")[2].split()[:2]
    assert Path(shown) == config.relative_to(CONFIGS.parents[1])
    monkeypatch.chdir(tmp_path)
    flags = DATA[Path(script).stem](tmp_path)
    flags += ["--teacher", "teacher", "--student_layers", "1", "--num_blocks", "1", "--max_steps", "2"]
    monkeypatch.setattr(sys, "argv", [script, str(config), *flags, "--use_cpu", "true", "--fit", "false"])
    importlib.import_module(Path(script).stem).main()
    teacher, *students = map(json.loads, Path("outputs", config.stem, "results.jsonl").read_text().splitlines())
    assert teacher["model"] == "teacher"
    assert students
    if config.stem == "ladder":
        assert load_stepping_stone(tmp_path / "outputs" / "ladder" / "ladder" / "stone_1").num_parameters() > 0
