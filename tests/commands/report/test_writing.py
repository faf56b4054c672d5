"""The page: one file that needs nothing else and holds all that was logged; and what is refused in one sentence."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification

from hf_blockkd import make_student
from hf_blockkd.commands.cli import main
from hf_blockkd.commands.report import report
from hf_blockkd.commands.report.writing import Report

from ...helpers.tiny_models import tiny_vit
from ...helpers.training import image_rows, make_trainer
from .helpers import write_run

RUNGS = [
    {"objective": "block_kd", "seed": seed, "rung": rung, "test": 0.5 + value + seed / 100, "metric": "accuracy"}
    | {"flops": cost, "parameters": 10 * cost, "time": cost / 1024}
    for seed in (0, 1)
    for rung, value, cost in (("student", 0.0, 50), ("stone 1", 0.1, 100), ("teacher", 0.2, 400))
]


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags, self.attributes, self.texts, self.headings = [], [], [], []
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())
            if self.tags[-1] in ("h1", "h2", "h3", "summary"):
                self.headings.append(data.strip())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A small run of a student that was cut out of its teacher."""
    folder = tmp_path_factory.mktemp("run")
    teacher = tiny_vit(hidden_size=32)
    trainer = make_trainer(
        folder,
        make_student(teacher, num_layers=2, hidden_size=16, channels="random", fit=False),
        teacher,
        image_rows(),
        eval_dataset=image_rows(seed=1),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        eval_stepping_stones=True,
        temperature=3.0,
        skip_memory_metrics=False,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return folder


@pytest.fixture(scope="module")
def written(run, tmp_path_factory) -> Report:
    return report(run, tmp_path_factory.mktemp("page"))


def test_the_page_needs_nothing_beside_it(written):
    page = Page(written.page)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert not re.search(r"url\(|@import|srcset", page.html)
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) > 6
    for source in sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert all(dict(page.attributes).get(name) for name in ("alt", "lang"))
    assert [path.name for path in written.pictures] == ["losses.png", "path.png", "blocks.png", "map.png"]


def test_the_page_holds_every_logged_term(run, written):
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    page = Page(written.page)
    terms = {
        key
        for entry in log
        for key in entry
        if not re.search("runtime|per_second|_mem_|preparation|^total|^train_", key)
    }
    terms -= {"step", "epoch"}
    assert {"loss", "stone_1/task", "eval_teacher_loss", "eval_block_1_cka", "learning_rate"} <= terms
    assert terms <= set(page.texts)
    # In the caption of the panel that draws it, and in the table.
    assert all(page.texts.count(term) > 1 for term in terms)


def test_the_page_tells_settings_cut_blocks_time_and_memory(run, written):
    texts = Page(written.page).texts
    settings = texts[texts.index("Settings") : texts.index("Models")]
    assert settings[settings.index("temperature") + 1] == "3.0"
    assert "learning_rate" not in settings  # is as by default
    models = texts[texts.index("Models") :]
    assert models[models.index("layers") + 1 :][:3] == ["2", "3", "67%"]
    assert "student 1 layer -> teacher 2 layers" in models
    count = AutoModelForImageClassification.from_pretrained(run).num_parameters()
    assert f"The student has {count:,} parameters." in models
    assert re.fullmatch(r"[\d.]+ s", models[models.index("training") + 1])
    assert models[models.index("train_mem_cpu_peaked_delta") + 1].endswith("MiB")


def test_the_page_fits_a_phone_and_a_dark_room(written):
    html = written.page.read_text()
    assert '<meta name="viewport" content="width=device-width' in html
    assert "@media (prefers-color-scheme: dark)" in html
    assert "overflow-x" not in html


def test_several_runs_are_compared_over_their_seeds(tmp_path):
    for seed, values in enumerate(((0.5, 0.7), (0.6, 0.7))):
        for name, value in zip(("alone", "kd"), values, strict=True):
            entry = {"loss": 1.0, "eval_accuracy": value, "eval_teacher_accuracy": 0.85}
            write_run(tmp_path / name / f"seed_{seed}", entry, objective=name, seed=seed)
    written = report([tmp_path / "kd", tmp_path / "alone"])
    assert written.page == tmp_path / "report.html"
    assert written.pictures[-1] == tmp_path / "comparison.png"
    texts = Page(written.page).texts
    assert texts[texts.index("kd") + 1 :][:3] == ["2", "0.7000 ± 0.0000", "50%"]
    assert texts[texts.index("alone") + 1 :][:3] == ["2", "0.5500 ± 0.0707", "0%"]


def test_ladders_of_different_runs_are_kept_apart_and_those_of_seeds_put_together(tmp_path):
    for name, rate, shift in (("slow", 1e-3, 0.0), ("fast", 1e-2, 0.3)):
        for seed in (0, 1):
            folder = tmp_path / name / f"seed_{seed}"
            write_run(folder, {"loss": 1.0, "eval_accuracy": 0.5}, objective="ladder", seed=seed, learning_rate=rate)
            own = [{**rung, "test": rung["test"] + shift} for rung in RUNGS if rung["seed"] == seed]
            (folder / "ladder.jsonl").write_text("".join(json.dumps(rung) + "\n" for rung in own))
    texts = Page(report(tmp_path).page).texts
    ladder = texts[texts.index("From student to teacher") :]
    rows = {tuple(ladder[i - 1 : i + 1]): ladder[i + 1] for i, text in enumerate(ladder) if text == "stone 1"}
    assert rows == {("slow", "stone 1"): "0.6050 ± 0.0071", ("fast", "stone 1"): "0.9050 ± 0.0071"}


def test_ladders_by_different_metrics_are_never_put_together(tmp_path):
    for metric, shift in (("accuracy", 0.0), ("loss", 1.0)):
        write_run(tmp_path / metric, {"loss": 1.0}, objective="ladder", metric_for_best_model=metric)
        own = [{**rung, "test": rung["test"] + shift, "metric": metric} for rung in RUNGS]
        (tmp_path / metric / "ladder.jsonl").write_text("".join(json.dumps(rung) + "\n" for rung in own))
    written = report(tmp_path)
    assert {path.name for path in written.pictures} >= {"ladder_accuracy.png", "ladder_loss.png"}
    texts = Page(written.page).texts
    assert {"0.6050 ± 0.0071", "1.6050 ± 0.0071"} <= set(texts)


def test_a_ladder_is_drawn_against_its_costs(tmp_path):
    (tmp_path / "ladder.jsonl").write_text("".join(json.dumps(rung) + "\n" for rung in RUNGS))
    written = report(tmp_path)
    assert written.pictures == [tmp_path / "ladder.png"]
    page = Page(written.page)
    assert page.tags.count("img") == 3
    texts = page.texts
    assert texts[texts.index("stone 1") + 1 :][:4] == ["0.6050 ± 0.0071", "0.25", "0.25", "0.25"]


def test_what_stands_in_files_cannot_become_markup(tmp_path):
    write_run(tmp_path / "<b>run", {"loss": 1.0, "<i>term": 2.0}, lr_scheduler_kwargs={"a": "<script>"})
    html = report(tmp_path / "<b>run").page.read_text()
    assert "&lt;i&gt;term" in html
    assert not re.search("<b>|<i>|<script>", html)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("training_args.json", "{", "training_args.json holds no arguments of a run"),
        ("training_args.json", "[]", "training_args.json holds no arguments of a run (it is a list)"),
        ("cut.json", "[]", "cut.json holds no cut"),
        ("blocks.json", '{"student": 3}', "blocks.json holds no cut into blocks"),
        ("model.safetensors", "x", "model.safetensors holds no weights"),
        ("ladder.jsonl", '{"rung": "student"}', "ladder.jsonl has a line 1 without `objective`"),
        ("ladder.jsonl", "{", "ladder.jsonl has a line 1 that is no JSON"),
        ("ladder.jsonl", "", "ladder.jsonl holds no rung"),
        ("trainer_state.json", '{"log_history": 3}', "trainer_state.json is no state of a trainer"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, capsys, name, text, message):
    write_run(tmp_path, {"loss": 1.0})
    (tmp_path / name).write_text(text)
    assert main(["report", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)
