"""Linear maps of a cut student, fitted to what the teacher's write, before any training: `refit`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..connectors.least_squares import TunedLeastSquares
from ..pairing.positions import rows_without_padding
from ..routing.calls import check_calls, record_calls
from ..routing.entering import Extras, capture_states, enter_at, record_extras
from ..routing.forwards import in_dtype_of, in_eval_mode
from ..routing.layers import LayerStack
from ..routing.logits import only_logits
from .narrowing import Narrowing
from .progress import bar

NUM_EXAMPLES = 1024
"""At most, to fit to: of short texts and small images."""
NUM_POSITIONS = 16_384
"""At most, of all examples: enough for maps of a few thousand inputs, and soon run through."""
BATCH_SIZE = 32


@torch.no_grad()
def refit(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    stacks: tuple[LayerStack, LayerStack],
    chosen: Sequence[int],
    narrowing: Narrowing | None,
    batches: Iterable[Mapping[str, Any]],
) -> None:
    """Fit the linear maps of a student, layer by layer, to what the teacher's write on some examples.

    Each map gets what the student itself hands to it by then, and is fitted by least squares to the entries that are
    kept of what the teacher's map writes. The last map of each layer is fitted to what the student's states lack of
    those that enter the next layer that is kept, so that it takes over from layers that are left out as far as a linear
    map can (as in ReplaceMe, arXiv 2505.02819). Maps that several places share stay as they are.

    Args:
        teacher: The teacher.
        student: Cut out of it.
        stacks: Layers of the teacher, and of the student.
        chosen: For each of the student's layers, the index of the teacher's.
        narrowing: The entries that are kept; `None` for a student of the teacher's width.
        batches: Inputs for both, of which those are read that have `NUM_POSITIONS` positions together.

    Raises:
        UnsupportedArchitectureError: If states cannot be routed through the layers; nothing is changed then.
    """
    theirs, ours = _Half(teacher, stacks[0]), _Half(student, stacks[1])
    with in_eval_mode(teacher), in_eval_mode(student), only_logits(teacher), only_logits(student):
        runs: list[tuple[_Run, _Run]] = []
        for batch in bar(batches, "Batches to fit to"):
            runs.append((theirs.begin(batch), ours.begin(batch)))
            if sum(run.states[..., 0].numel() for run, _ in runs) >= NUM_POSITIONS:
                break
        pairs = itertools.pairwise([*chosen, len(theirs.stack)])
        for index, (layer, following) in enumerate(bar(pairs, "Layers fitted", len(chosen))):
            fit = _Fit(theirs, ours, runs, (layer, index), narrowing)
            wanted = [theirs.states(their_run, layer, following) for their_run, _ in runs]
            groups = ours.maps_of_layer(runs[0][1], index)
            for group in groups[:-1]:
                fit.to_what_the_teachers_write(group)
            for group in groups[-1:]:  # layers of convolutions have none
                fit.to_the_states(wanted, following, group)
            for (their_run, our_run), states in zip(runs, wanted, strict=True):
                their_run.states, our_run.states = states, ours.states(our_run, index, index + 1)
        fit = _Fit(theirs, ours, runs, (len(theirs.stack), len(ours.stack)), narrowing)
        for group in ours.maps_after_the_layers(runs[0][1]):
            fit.to_what_the_teachers_write(group)


@dataclass
class _Run:
    """A batch, and the states with which a model stands in it."""

    batch: Mapping[str, Any]
    states: torch.Tensor
    extras: Extras


class _EnoughError(Exception):
    """Ends a forward of which nothing more is needed."""


class _Half:
    """One of both models, which is run in parts from states that are kept."""

    def __init__(self, model: PreTrainedModel, stack: LayerStack) -> None:
        self.model, self.stack = model, stack
        uses = Counter(id(own) for _, own in model.named_parameters(remove_duplicate=False))
        self.maps = {
            name: module
            for name, module in model.named_modules()
            if _is_map(module) and all(uses[id(own)] == 1 for own in module.parameters())
        }

    def begin(self, batch: Mapping[str, Any]) -> _Run:
        stack, batch = self.stack, in_dtype_of(self.model, batch)
        with capture_states(stack, [0]) as states, record_extras(stack) as extras, record_calls(stack) as calls:
            self.model(**batch)
        check_calls(self.model, stack, calls, range(len(stack) + 1))
        return _Run(batch, states[0], extras)

    def states(self, run: _Run, first: int, until: int) -> torch.Tensor:
        """What leaves the layers from `first` until another one."""
        return self.run(run, first, until, ())[1]

    def maps_of_layer(self, run: _Run, index: int) -> list[list[str]]:
        """Names of the maps in a layer, those with the same input together, in the order of their calls."""
        prefix = f"{self.stack.path}.{index}."
        names = [name for name in self.maps if name.startswith(prefix)]
        return _groups(self.run(run, index, index + 1, names)[0])

    def maps_after_the_layers(self, run: _Run) -> list[list[str]]:
        """Those between the last layer and the logits."""
        names = [name for name in self.maps if not name.startswith(f"{self.stack.path}.")]
        before = self.run(run, 0, 0, names)[0]
        after = self.run(run, len(self.stack), None, [name for name in names if name not in before])[0]
        return _groups(after)

    def run(
        self, run: _Run, first: int, until: int | None, names: Collection[str], only: bool = False
    ) -> tuple[dict[str, Any], torch.Tensor | None]:
        """Run some layers.

        Args:
            run: Where the model stands.
            first: The layer that its states enter.
            until: The layer that is not reached; `None` for a forward to its end.
            names: Maps that are watched.
            only: Whether nothing but these is needed.

        Returns:
            Name -> input and output of the map, in the order of calls, `None` where it is called more than once; and
            the states that would enter layer `until`.
        """
        found: dict[str, Any] = {}

        def keep(name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            found[name] = None if name in found else (args[0], output)
            if only and len(found) == len(names):
                raise _EnoughError

        def stop(*_: Any) -> None:
            raise _EnoughError

        hooks = [self.maps[n].register_forward_hook(lambda *call, n=n: keep(n, *call)) for n in names]
        try:
            with capture_states(self.stack, [] if until is None else [until]) as states:
                if until is not None and until < len(self.stack):
                    hooks.append(self.stack.layers[until].register_forward_pre_hook(stop))
                with enter_at(self.stack, first, run.states, run.extras):
                    self.model(**run.batch)
        except _EnoughError:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return found, states.get(until)


def _is_map(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight and adds its bias, which some that descend from `nn.Linear` do not."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if not isinstance(module, nn.Linear) or module.weight.is_meta:
        return False
    x = torch.linspace(-1, 1, 2 * module.in_features).view(2, -1).to(module.weight)
    try:
        return torch.allclose(module.forward(x), functional.linear(x, module.weight, module.bias), rtol=1e-2, atol=1e-5)
    except (RuntimeError, TypeError, ValueError):
        return False


def _groups(calls: Mapping[str, Any]) -> list[list[str]]:
    once = {name: call for name, call in calls.items() if call is not None}
    return [list(names) for _, names in itertools.groupby(once, key=lambda name: id(once[name][0]))]


class _Fit:
    """Fits maps of one of the student's layers, whose inputs are what the student hands to them.

    Args:
        theirs: The teacher.
        ours: The student.
        runs: Both, as they enter the layer, for each batch.
        layers: Index of the teacher's layer, and of the student's.
        narrowing: The entries that are kept.
    """

    def __init__(
        self,
        theirs: _Half,
        ours: _Half,
        runs: Sequence[tuple[_Run, _Run]],
        layers: tuple[int, int],
        narrowing: Narrowing | None,
    ) -> None:
        self.theirs, self.ours, self.runs, self.narrowing = theirs, ours, runs, narrowing
        self.layer, self.index = layers

    def to_what_the_teachers_write(self, group: Sequence[str]) -> None:
        origins = {name: origin for name in group if (origin := self._origin(name)) in self.theirs.maps}
        fits = {name: TunedLeastSquares() for name in origins}
        for their_run, our_run in self.runs:
            ours = self.ours.run(our_run, self.index, None, list(origins), only=True)[0]
            theirs = self.theirs.run(their_run, self.layer, None, list(origins.values()), only=True)[0]
            for name, fit in fits.items():
                call, their_call = ours.get(name), theirs.get(origins[name])
                # An expert may get other tokens, or none, and of what is new nothing is kept.
                wanted = None if their_call is None else their_call[1][..., self._kept(name)]
                if call is not None and wanted is not None and call[1].shape == wanted.shape:
                    self._add(fit, our_run, name, call[0], wanted - call[1])
        for name, fit in fits.items():
            self._change(name, fit)

    def to_the_states(self, wanted: Sequence[torch.Tensor], following: int, group: Sequence[str]) -> None:
        """Fit a layer's last map to what its states lack of the teacher's, before layer `following`, if that helps."""
        name = group[-1]
        kept = slice(None) if self.narrowing is None else self.narrowing.entries_of_states(following)
        calls, states = self.ours.run(self.runs[0][1], self.index, self.index + 1, [name])
        is_new = self._origin(name) not in self.theirs.maps
        width = wanted[0].shape[-1] if self.narrowing is None else len(kept)
        turned = self.ours.stack.turned  # to what a map inside the layer reads and writes
        shapes = {calls[name][1].shape, turned(states).shape, (*turned(wanted[0]).shape[:-1], width)}
        if len(shapes) > 1 or not (is_new or self._kept(name) == kept):
            # It does not write into the states, or these have other positions than the teacher's.
            self.to_what_the_teachers_write(group)
            return
        fit, before, after = TunedLeastSquares(), 0.0, 0.0
        for (_, our_run), target in zip(self.runs, wanted, strict=True):
            calls, states = self.ours.run(our_run, self.index, self.index + 1, [name])
            lack = target[..., kept] - states
            before += lack.float().square().sum().item()
            self._add(fit, our_run, name, calls[name][0], turned(lack))
        own = [parameter.clone() for parameter in self.ours.maps[name].parameters()]
        self._change(name, fit)
        for (_, our_run), target in zip(self.runs, wanted, strict=True):
            states = self.ours.states(our_run, self.index, self.index + 1)
            after += (target[..., kept] - states).float().square().sum().item()
        # A norm behind the sum bends what is linear here.
        if not after < before:
            for parameter, value in zip(self.ours.maps[name].parameters(), own, strict=True):
                parameter.copy_(value)

    def _origin(self, name: str) -> str:
        prefix = f"{self.ours.stack.path}.{self.index}."
        return f"{self.theirs.stack.path}.{self.layer}.{name.removeprefix(prefix)}" if name.startswith(prefix) else name

    def _kept(self, name: str) -> Any:
        if self.narrowing is None:
            return slice(None)
        module = self.ours.maps[name]
        return self.narrowing.entries(f"{self._origin(name)}.weight", 1 if isinstance(module, Conv1D) else 0)

    def _add(self, fit: TunedLeastSquares, run: _Run, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        fit.add(*rows_without_padding(self.ours.model, name, run.batch, x, y))

    def _change(self, name: str, fit: TunedLeastSquares) -> None:
        module = self.ours.maps[name]
        found = fit.solve(bias=module.bias is not None)
        if found is not None:
            weight, bias = found
            module.weight += (weight.T if isinstance(module, Conv1D) else weight).to(module.weight)
            if module.bias is not None:
                module.bias += bias.to(module.bias)
            # Inside a person's autocast, forwards would go on with the weights as they were.
            torch.clear_autocast_cache()
