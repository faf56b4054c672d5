"""Which dimensions of a model's tensors go together, found by following them through its forward."""
