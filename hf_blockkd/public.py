"""The names of this package that people import, from the rooms that they are in."""

from .config import BlockwiseDistillConfig
from .ladder.loading import load_stepping_stone
from .pairing.blocks import BlockMap
from .routing.architectures import Architecture, register_architecture
from .routing.checking import RoutingReport, check_routing
from .routing.errors import UnsupportedArchitectureError
from .routing.layers import LayerStack, find_layer_stack
from .students.student import make_student
from .trainer import BlockwiseDistillTrainer

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
