"""Own images, of any size and colour: what size the model takes, and whether the saved student takes them from disk."""

import distill_vit
import numpy as np
import pytest
import torch
from arguments import ComparisonArguments
from colour import make_colour
from comparison import compare
from image_data import ImageDataArguments, choose_size
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, pipeline
from transformers import ViTImageProcessorPil as Processor

from ..helpers.images import SHAPE, TINY, draw, short_run


def load(data: ImageDataArguments, **fields):
    return distill_vit.load_task(ComparisonArguments(train_teacher=True, teacher_config=TINY, **fields), data)


@pytest.mark.parametrize("colour", ["L", "RGB"])
def test_trained_models_take_a_file_from_disk_in_a_pipeline(tmp_path, colour):
    data = draw(tmp_path / "images", [(8, 8)] * 20, "L")
    script = ComparisonArguments(
        train_teacher=True, teacher_config=TINY, teacher_epochs=1, student_layers=1, methods=["kd"]
    )
    task = distill_vit.load_task(script, data)
    compare(script, data, short_run(tmp_path / "run"), task)
    file = tmp_path / "images" / "cat" / "0.png"
    if colour == "RGB":
        file = tmp_path / "colour.png"
        pixels = np.random.default_rng(1).integers(0, 256, (20, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    for model in ("teacher", "kd"):
        answers = pipeline("image-classification", model=str(tmp_path / "run" / model))(str(file))
        assert {answer["label"] for answer in answers} == {"cat", "dog"}


def test_a_model_made_to_take_colour_answers_as_it_did_to_the_grey_image(tmp_path):
    model = ViTForImageClassification(ViTConfig(image_size=8, num_channels=1, **SHAPE)).eval()
    processor = Processor(size={"height": 8, "width": 8}, image_mean=[0.4], image_std=[0.3])
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    with torch.no_grad():
        expected = model(**processor(image.convert("L"), return_tensors="pt")).logits.softmax(-1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    make_colour(tmp_path)
    image.save(tmp_path / "image.png")
    answers = pipeline("image-classification", model=str(tmp_path))(str(tmp_path / "image.png"))
    for answer in answers:
        # PIL rounds grey to a whole number.
        assert answer["score"] == pytest.approx(expected[0, model.config.label2id[answer["label"]]].item(), abs=2e-3)

    before = AutoModelForImageClassification.from_pretrained(tmp_path).state_dict()
    make_colour(tmp_path)
    after = AutoModelForImageClassification.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_images_of_unequal_sizes_become_squares_of_whole_patches_and_it_is_said(tmp_path, capsys):
    task = load(draw(tmp_path, [(23, 83), (40, 30), (64, 64), (50, 29), (31, 31)]))
    assert task.teacher.config.image_size == 32  # of shorter sides 23, 29, 30, 31 and 64
    assert task.as_eval(task.eval_set)[0]["pixel_values"].shape == (1, 32, 32)
    said = capsys.readouterr().out
    assert "takes images of 32 x 32" in said
    assert "sizes, from 29 x 50 to 83 x 23" in said


def test_images_of_one_size_keep_it(tmp_path, capsys):
    task = load(draw(tmp_path, [(12, 8)] * 4, "RGB"))
    assert task.teacher.config.image_size == [8, 12]
    assert task.as_eval(task.eval_set)[0]["pixel_values"].shape == (3, 8, 12)
    assert "takes images of 8 x 12" in capsys.readouterr().out


def test_a_size_that_was_asked_for_holds_for_model_and_processor(tmp_path):
    data = draw(tmp_path, [(12, 8)] * 4)
    of_config = ComparisonArguments(train_teacher=True, teacher_config=TINY.replace("}", ', "image_size": 16}'))
    data_of_flag = ImageDataArguments(dataset=str(tmp_path), image_size=[20, 24])
    for script, own, size in ((of_config, data, (16, 16)), (of_config, data_of_flag, (20, 24))):
        task = distill_vit.load_task(script, own)
        assert task.teacher(pixel_values=torch.zeros(1, 1, *size)).logits.shape == (1, 2)
        assert task.as_eval(task.eval_set)[0]["pixel_values"].shape == (1, *size)


@pytest.mark.parametrize("wanted", [3, [2, 8], [8, 8, 8]])
def test_what_is_no_size_is_refused(wanted):
    with pytest.raises(ValueError, match=r"`image_size` is .* at least one patch, 4"):
        choose_size([Image.new("L", (8, 8))], wanted, patch_size=4)


def test_the_size_of_a_loaded_teacher_stays(tmp_path):
    data = draw(tmp_path / "images", [(8, 8)] * 4)
    data.image_size = [16]
    with pytest.raises(ValueError, match=r"`image_size` is \[16\], but the teacher"):
        distill_vit.load_task(ComparisonArguments(teacher=str(tmp_path)), data)
