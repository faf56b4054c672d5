"""Block-wise logit distillation for Hugging Face transformers."""

from .architectures import Architecture, register_architecture
from .blocks import BlockMap
from .config import BlockwiseDistillConfig
from .errors import UnsupportedArchitectureError
from .layers import LayerStack, find_layer_stack
from .routing import RoutingReport, check_routing
from .student import make_student
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
    "make_student",
    "register_architecture",
]
