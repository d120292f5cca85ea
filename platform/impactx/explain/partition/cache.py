"""The fast form of the module that an attribution explained last, kept for its next call."""

from __future__ import annotations

import hashlib
import itertools

import torch
from torch import Tensor, nn

from impactx.explain.partition.fast import FastScore, fast_score
from impactx.explain.scores import Probabilities


class FastForm:
    """The fast form of the module that was explained last; making it takes a second.

    It is a cache and no part of the value of whatever holds it: it equals every other one, and its
    copies are empty. A module that was changed in place since is brought into its fast form anew.
    """

    def __init__(self) -> None:
        self._last: tuple[nn.Module, tuple[object, ...], FastScore] | None = None

    def of(self, module: nn.Module, shape: tuple[int, int, int], softmax: bool) -> FastScore:
        """Return a module's fast form.

        Args:
            module: float32 (B, C, H, W) to scores (B, K), in eval mode.
            shape: (C, H, W) of the images.
            softmax: Whether the softmax of the scores is wanted in place of the scores.
        """
        key = shape, softmax, _state(module)
        last = self._last
        if last is None or last[0] is not module or last[1] != key:
            explained = Probabilities(module) if softmax else module
            last = self._last = module, key, fast_score(explained, shape)
        return last[2]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FastForm)

    def __hash__(self) -> int:
        return hash(FastForm)

    def __reduce__(self) -> tuple[type[FastForm], tuple[()]]:
        return FastForm, ()


def _state(module: nn.Module) -> tuple[str, str]:
    """Return where a module is, and on a CPU, where its fast form holds copies, what it holds.

    Numbers and tensors that are plain attributes of its parts count as well.
    """
    device = str(next(module.parameters(), torch.empty(0)).device)
    digest = hashlib.blake2b()
    if device != "cpu":
        return device, ""
    for name, part in module.named_modules():
        own = itertools.chain(part.named_parameters(recurse=False),
                              part.named_buffers(recurse=False), sorted(vars(part).items()))
        for key, value in own:
            if isinstance(value, Tensor):
                digest.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}".encode())
                values = value.detach().cpu().contiguous().reshape(-1)
                digest.update(values.view(torch.uint8).numpy().data)
            elif isinstance(value, int | float | str | tuple | list):
                digest.update(f"{name}.{key} {value!r}".encode())
    return device, digest.hexdigest()
