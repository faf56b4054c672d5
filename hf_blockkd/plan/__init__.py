"""What a distillation will cost, before anything trains."""
