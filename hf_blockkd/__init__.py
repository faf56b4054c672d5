"""Block-wise logit distillation for Hugging Face transformers."""

import logging
import os

from .config import BlockwiseDistillConfig
from .ladder.loading import load_stepping_stone
from .pairing.blocks import BlockMap
from .routing.architectures import Architecture, register_architecture
from .routing.checking import RoutingReport, check_routing
from .routing.errors import UnsupportedArchitectureError
from .routing.layers import LayerStack, find_layer_stack
from .students.student import make_student
from .trainer import BlockwiseDistillTrainer
from .version import __version__ as __version__

__all__ = [
    "Architecture",
    "BlockMap",
    "BlockwiseDistillConfig",
    "BlockwiseDistillTrainer",
    "LayerStack",
    "RoutingReport",
    "UnsupportedArchitectureError",
    "check_routing",
    "find_layer_stack",
    "load_stepping_stone",
    "make_student",
    "register_architecture",
]

# What every process finds out, the first one says.
if os.environ.get("LOCAL_RANK", "0") != "0":
    logging.getLogger(__name__).setLevel(logging.ERROR)
