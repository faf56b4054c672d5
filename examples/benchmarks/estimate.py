"""What `hf-blockkd plan --gpus` estimates beside what was measured on a GPU, for the shapes of the step benchmark.

    python examples/benchmarks/estimate.py examples/benchmarks/results/step_time_h200.json

No GPU is needed: steps are counted on shapes. The peak is that of memory above the weights and the optimizer's.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

import transformers
from shapes import GPU_SHAPES

from hf_blockkd import BlockwiseDistillConfig
from hf_blockkd.plan.estimate import UTILISATION, make_estimate
from hf_blockkd.plan.without_values import without_values

ROWS = {
    "plain KD": ["hf_blockkd, plain KD"],
    "the default": ["hf_blockkd, the default", "hf_blockkd, default, fitted, no stone"],
    "last two stones": ["hf_blockkd, states, last two stones", "hf_blockkd, default, fitted"],
}
"""Setting of an estimate -> names of its row in the results, now and when the H200's were written."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--utilisation", type=float, default=UTILISATION)
    parser.add_argument("--shapes", nargs="+", help="Default: all that were measured.")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    measured = json.loads(args.results.read_text(encoding="utf-8"))["shapes"]
    print("| shape | setting | dominated by | estimate, ms | measured | ratio | estimate, MiB | measured | ratio |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for shape in GPU_SHAPES:
        if shape.name not in (args.shapes or measured):
            continue
        batch = shape.make_batch()
        is_text = "input_ids" in batch
        size, length = batch["labels"].shape[0], batch["input_ids"].shape[1] if is_text else None
        with without_values() if is_text else nullcontext():  # how images are cut is found out by values
            models = shape.make_model(False), shape.make_model(True)
            config = BlockwiseDistillConfig("unused", use_cpu=True, bf16=True, state_blocks="last_two")
            estimate = make_estimate(
                *models, config, args.gpu, batch_size=size, sequence_length=length, utilisation=args.utilisation
            )
        for step in estimate.steps:
            row = next(measured[shape.name][name] for name in ROWS[step.name] if name in measured[shape.name])
            time, peak = step.step_seconds * 1e3, (step.memory["activations"] + step.memory["gradients"]) / 2**20
            print(
                f"| {shape.name} | {step.name} | {step.dominant} | {time:.1f} | {row['seconds'] * 1e3:.1f} "
                f"| {time / row['seconds'] / 1e3:.2f} | {peak:,.0f} | {row['peak_mib']:,.0f} "
                f"| {peak / row['peak_mib']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
