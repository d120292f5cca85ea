"""Where a fast form of a model and the model itself part: the first operation that is another."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from impactx.explain.partition.fast import FastScore

# They compute nothing, and one of the two may lack them.
_NO_COMPUTATION = ("detach", "alias", "lift_fresh", "clone", "copy", "view", "reshape", "_assert",
                   "sym_", "expand", "contiguous", "_to_copy", "permute", "unsqueeze")


def first_difference(score: FastScore, images: Tensor) -> str:
    """Return where a model and the graph of which its fast form was made part, for a message.

    Args:
        score: The model with its fast form.
        images: (1, C, H, W), for which the two differ.
    """
    if score.graph is None:
        return "the form was not made of a graph"
    try:
        own, of_graph = _run(score.plain, images), _run(score.graph, images)
    except Exception as error:  # it is the explanation of a difference, which is reported anyway
        return f"where they part was not found ({error})"
    for one, other in zip(own.seen, of_graph.seen, strict=False):
        if one[1] != other[1]:
            return (f"{one[0]} computes {one[1]} where the form computes {other[1]}")
        if not torch.allclose(one[2], other[2], rtol=1e-3, atol=1e-6, equal_nan=True):
            return f"they part first at {one[1]} in {one[0]}"
    if len(own.seen) != len(of_graph.seen):
        longer, who = ((own, "only the model itself") if len(own.seen) > len(of_graph.seen)
                       else (of_graph, "only the form"))
        layer, operation, _ = longer.seen[min(len(own.seen), len(of_graph.seen))]
        return f"{who} computes {operation}" + (f" in {layer}" if longer is own else "")
    if score.head is not None:
        pooled = score.head(images)
        assert score.rest is not None
        return ("each operation by itself gives the same; the first layer is split off, its values "
                f"reach {float(pooled.abs().max()):.3g}")
    return ("each operation by itself gives the same, so that they part in the form that is made "
            "of all of them, or the weights were changed since it was made")


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes of each operation the layer, its name with its numbers, and the size of its result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, str, Tensor]] = []
        self.layers: list[str] = []

    def __torch_dispatch__(  # noqa: D105
        self, func: Any, types: Any, args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if isinstance(result, Tensor) and result.is_floating_point() \
                and not name.rstrip("_").startswith(_NO_COMPUTATION):
            numbers = [repr(value) for value in (*args[1:], *(kwargs or {}).values())
                       if isinstance(value, int | float | bool | list | tuple)
                       and not any(isinstance(v, Tensor) for v in _each(value))]
            # In the module's own words: relu_ and relu are one operation.
            self.seen.append((self.layers[-1] if self.layers else "the model",
                              f"{name.rstrip('_')}({', '.join(numbers)})",
                              result.detach().double().abs().mean()))
        return result


def _each(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _run(module: nn.Module, images: Tensor) -> _Recorder:
    recorder = _Recorder()
    hooks: list[Any] = []

    def enter(name: str, *_: Any) -> None:
        recorder.layers.append(name)

    def leave(*_: Any) -> None:
        recorder.layers.pop()

    for name, part in module.named_modules():
        if name:
            hooks += [part.register_forward_pre_hook(functools.partial(enter, name)),
                      part.register_forward_hook(leave)]
    try:
        with recorder:
            module(images.clone())
    finally:
        for hook in hooks:
            hook.remove()
    return recorder
