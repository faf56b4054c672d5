"""Through how many architectures of the installed transformers can hidden states be routed, and how exactly.

    python examples/benchmarks/coverage.py --output_dir outputs/coverage

A tiny random model of every (task, model type) pair of six auto-model mappings goes through `check_routing`, each in a
process of its own with a limit on its time and its memory. The folder gets `pairs.jsonl`, a line for each pair, and
`table.md`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from tiny_configs import TASKS, model_types, tiny_model
from torch import nn
from transformers import PreTrainedModel

from hf_blockkd import UnsupportedArchitectureError, check_routing, find_layer_stack
from hf_blockkd.routing.dummy_inputs import dummy_inputs
from hf_blockkd.routing.entering import capture_states, enter_at, record_extras
from hf_blockkd.routing.logits import main_outputs, only_logits

STATUSES = {
    "exact": "error 0.0 in float32 at every depth",
    "refused": "`check_routing` says what stands in the way",
    "not built": "no model from a default config, or it does not run on text or images alone",
    "broken": "anything else",
}
Row = dict[str, Any]
Examine = Callable[[str, str], Row]


def examine(task: str, model_type: str) -> Row:
    """What becomes of one pair: a line of the results."""
    row: Row = {"task": task, "model_type": model_type}
    try:
        model = tiny_model(task, model_type)
    except Exception as error:
        return {**row, "status": "not built", "reason": describe(error)}
    row |= {"model": type(model).__name__, "parameters": model.num_parameters()}
    try:
        report = check_routing(model)
        row |= {"layers_path": report.layers_path, "layers": report.num_layers, "max_abs_error": report.max_abs_error}
        if report.max_abs_error != 0.0:
            return {**row, "status": "broken", "reason": f"error {report.max_abs_error:.3g} at {report.worst_depth}"}
        silent, idle = insensitive_depths(model)
        if silent or idle:
            reason = f"the logits do not depend on the states at depths {silent}, or layers {idle} change nothing"
            return {**row, "status": "broken", "reason": reason}
        if model.config.is_encoder_decoder:
            row |= examine_encoder(model)
    except UnsupportedArchitectureError as error:
        return {**row, "status": "refused", "reason": str(error)}
    except Exception as error:
        return {**row, "status": "broken", "reason": describe(error)}
    return {**row, "status": "exact"}


def examine_encoder(model: PreTrainedModel) -> Row:
    """The same for the encoder of an encoder-decoder, whose stack is named by its path."""
    encoder = model.get_encoder()
    if encoder is model:
        return {}
    inside = {*encoder.modules()}
    path = next(name for name, one in model.named_modules() if one in inside and _is_stack(one))
    return {"encoder_path": path, "encoder_max_abs_error": check_routing(model, layers_path=path).max_abs_error}


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(one) for one in module}) == 1


@torch.no_grad()
def insensitive_depths(model: PreTrainedModel) -> tuple[list[int], list[int]]:
    """Where a wrong route would go unnoticed.

    Returns:
        Depths at which other states make no other logits, and layers that leave the states as they are.
    """
    stack, inputs = find_layer_stack(model), dummy_inputs(model)
    generator = torch.Generator().manual_seed(0)
    silent = []
    with only_logits(model):
        with capture_states(stack, range(len(stack) + 1)) as states, record_extras(stack) as extras:
            clean = main_outputs(model(**inputs))
        for depth, own in states.items():
            noise = torch.randn(own.shape, generator=generator) * own.std()
            with enter_at(stack, depth, own + noise, extras):
                other = main_outputs(model(**inputs))
            if all(torch.equal(a, b) for a, b in zip(clean, other, strict=True)):
                silent.append(depth)
    idle = [index for index in range(len(stack)) if torch.equal(states[index], states[index + 1])]
    return silent, idle


def describe(error: Exception) -> str:
    message = " ".join(str(error).split())
    # What is missing, in transformers' words or ours, speaks for itself.
    return message if isinstance(error, (ImportError, ValueError)) else f"{type(error).__name__}: {message}"


def examine_all(
    examine: Examine, pairs: list[tuple[str, str]], processes: int, seconds: float, memory_gib: float
) -> Iterator[Row]:
    """Examine each pair in a process of its own; a crash, or a limit that is reached, makes a row, too.

    Args:
        examine: Makes the row of a pair.
        pairs: Task and model type.
        processes: How many run at a time.
        seconds: Limit on the time of each.
        memory_gib: Limit on its memory.

    Yields:
        The rows, in the order in which the pairs finish.
    """
    # Forked, they have torch and transformers already.
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(pairs)), {}
    while waiting or running:
        while waiting and len(running) < processes:
            ours, theirs = context.Pipe(duplex=False)
            pair = waiting.pop()
            process = context.Process(target=_in_a_process, args=(examine, pair, theirs, memory_gib))
            process.start()
            theirs.close()
            running[ours] = (pair, process, time.monotonic())
        answered = wait(list(running), timeout=0.2)
        for connection, (pair, process, start) in list(running.items()):
            passed = time.monotonic() - start
            if connection not in answered and passed < seconds:
                continue
            row = {"task": pair[0], "model_type": pair[1], "status": "broken"}
            if connection not in answered:
                process.kill()
                row["reason"] = f"not finished after {seconds:g} s"
            else:
                try:
                    row = connection.recv()
                except EOFError:
                    process.join()
                    row["reason"] = f"the process ended with exit code {process.exitcode}"
            process.join()
            connection.close()
            del running[connection]
            yield {**row, "seconds": round(passed, 2)}


def _in_a_process(examine: Examine, pair: tuple[str, str], answer: Connection, memory_gib: float) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gib * 2**30),) * 2)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    answer.send(examine(*pair))


def encoder_notes(rows: list[Row]) -> list[str]:
    """How many stacks of encoders are exact."""
    errors = [row["encoder_max_abs_error"] for row in rows if "encoder_max_abs_error" in row]
    exact = sum(error == 0.0 for error in errors)
    return [f"encoders of encoder-decoders, named by their path: {exact} of {len(errors)} exact"] if errors else []


def table(
    rows: list[Row],
    statuses: Mapping[str, str] = STATUSES,
    notes: Callable[[list[Row]], list[str]] = encoder_notes,
) -> str:
    """The counts by task and status, what else is to be said, and every pair that has a reason under it."""
    lines = [f"| task | pairs | {' | '.join(statuses)} |", f"| --- |{' ---: |' * (len(statuses) + 1)}"]
    counts = Counter((row["task"], row["status"]) for row in rows)
    for task in [*(task for task in TASKS if any(row["task"] == task for row in rows)), None]:
        numbers = [sum(n for (t, s), n in counts.items() if s == status and task in (t, None)) for status in statuses]
        name = "all" if task is None else task.lower().replace("_", " ")
        lines.append(f"| {name} | {sum(numbers)} | {' | '.join(map(str, numbers))} |")
    lines += ["", *(f"- {status}: {meaning}" for status, meaning in statuses.items())]
    lines += [f"- {note}" for note in notes(rows)]
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if "reason" in row:
            # Classes of one family differ in nothing but their name.
            reason = row["reason"].replace(row.get("model", "nothing"), "the model")
            reasons[row["status"], reason].append(f"{row['model_type']} ({row['task'].lower().replace('_', ' ')})")
    for status in statuses:
        of_status = {reason: names for (one, reason), names in reasons.items() if one == status}
        if of_status:
            lines += ["", f"{status.capitalize()}:", ""]
            lines += [f"- {', '.join(sorted(names))}: {reason}" for reason, names in sorted(of_status.items())]
    return "\n".join(lines) + "\n"


def main(
    examine: Examine, make_table: Callable[[list[Row]], str], description: str, output_dir: Path, seconds: float
) -> None:
    """Examine all pairs, or those that are asked for, and write and print what comes of it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output_dir", type=Path, default=output_dir, help="folder of the results")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="pairs examined at a time")
    parser.add_argument("--seconds", type=float, default=seconds, help="time limit of a pair")
    parser.add_argument("--memory_gib", type=float, default=6, help="memory limit of a pair")
    parser.add_argument("--model_types", nargs="+", help="only these, e.g. mixtral t5; default: all")
    args = parser.parse_args()

    torch.set_num_threads(1)
    chosen = [(t, m) for t in TASKS for m in model_types(t) if not args.model_types or m in args.model_types]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    rows = []
    with (args.output_dir / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for row in examine_all(examine, chosen, args.processes, args.seconds, args.memory_gib):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    text = make_table(rows)
    (args.output_dir / "table.md").write_text(text, encoding="utf-8")
    print(f"{text}\n{len(rows)} pairs in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(examine, table, __doc__.split("\n")[0], Path("outputs/coverage"), seconds=120)
