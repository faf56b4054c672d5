"""`hf-blockkd check`: whether hidden states can be routed through a model's layers, and how exactly."""

from __future__ import annotations

import argparse

import torch

from ..models.loading import has_no_weights, load_model
from ..routing.checking import check_routing
from ..routing.dummy_inputs import dummy_inputs
from ..routing.errors import UnsupportedArchitectureError
from ..routing.logits import main_outputs
from ..training.self_test import ROUTING_TOLERANCE


def run(args: argparse.Namespace) -> int:
    """Check a model, and print what was found.

    Raises:
        UnsupportedArchitectureError: If it cannot be a teacher.
    """
    model = load_model(args.model, args.config_only or has_no_weights(args.model))
    report = check_routing(model, layers_path=args.layers_path)
    print(f"model          {type(model).__name__}")
    print(f"layers path    {report.layers_path}")
    print(f"layers         {report.num_layers}")
    print(f"technique      {report.technique}")
    print(f"max abs error  {report.max_abs_error:.3g}")
    print(f"worst depth    {report.worst_depth}")
    with torch.no_grad():
        largest = max(logits.abs().max().item() for logits in main_outputs(model(**dummy_inputs(model))))
    if report.max_abs_error > ROUTING_TOLERANCE * largest:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} entered at layer {report.worst_depth} from its own hidden states gives logits "
            f"that differ from its own by {report.max_abs_error:.3g} (largest logit: {largest:.3g}), so it cannot be "
            "a teacher; name another stack with `--layers_path`."
        )
    return 0
