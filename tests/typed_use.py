"""What a person's script says of our names; `make types` holds that a strict type checker knows each of them."""
# pyright: strict, reportUnusedExpression=false, reportUnusedFunction=false

from typing import assert_type

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_blockkd import (
    BlockMap,
    BlockwiseDistillConfig,
    BlockwiseDistillTrainer,
    LayerStack,
    RoutingReport,
    check_routing,
    find_layer_stack,
    load_stepping_stone,
    make_student,
)


def distil(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    assert_type(find_layer_stack(teacher), LayerStack)
    assert_type(check_routing(teacher), RoutingReport)
    student = make_student(teacher, num_layers=2)
    assert_type(student, PreTrainedModel)
    args = BlockwiseDistillConfig("student", num_blocks=2, temperature=4.0, stepping_stones=[1, 2])
    trainer = BlockwiseDistillTrainer(model=student, teacher_model=teacher, args=args)
    assert_type(trainer.teacher, PreTrainedModel)
    assert_type(trainer.block_map, BlockMap)
    assert_type(trainer.connectors, nn.ModuleList)
    assert_type(trainer.stepping_stone_logits(batch), dict[int, Tensor])
    trainer.train(resume_from_checkpoint=True)
    trainer.save_stepping_stone(1, "stone")
    assert_type(load_stepping_stone("stone"), PreTrainedModel)
