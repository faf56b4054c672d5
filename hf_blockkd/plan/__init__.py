"""What a distillation will cost, before anything trains."""

from .costs import Plan, make_plan

__all__ = ["Plan", "make_plan"]
