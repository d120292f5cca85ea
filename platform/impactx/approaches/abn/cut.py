"""Where a backbone is cut for an attention branch, and a copy of its next stage.

The backbone is cut before its last stage that halves the resolution (Fukui et al. 2019, and their
published code); the copy keeps the resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from impactx.models.weights import first_line
from impactx.settings import ModelSettings

SMALLEST_MAP = 8  # a side of the attention map, in places

# Of a module, by its path: the shapes (c, h, w) of its input and output.
_Calls = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


class NoSplit(ValueError):
    """A backbone cannot be cut for an attention branch; the message says what was sought."""


@dataclass(frozen=True)
class Cut:
    """Where a backbone is cut: before a stage.

    Attributes:
        paths: The modules of the stage, one after another.
        channels: Of the stage's input.
        size: Height and width of the stage's input, in places.
    """

    paths: tuple[str, ...]
    channels: int
    size: tuple[int, int]

    @property
    def path(self) -> str:
        """The module before which the cut is."""
        return self.paths[0]


@torch.no_grad()
def find_cut(trunk: nn.Module, fresh: nn.Module, size: tuple[int, int], model: ModelSettings
             ) -> tuple[Cut, nn.Module, int]:
    """Find where a backbone is cut, and make the branch's stage.

    Args:
        trunk: The backbone.
        fresh: Another one of its architecture, whose modules become the branch's stage.
        size: Height and width of the preprocessed images, in pixels.
        model: The settings of the architecture, for the message.

    Returns:
        The cut, the stage after it taken from `fresh` and set to stride 1, and that stage's output
        channels.

    Raises:
        NoSplit: There is no place for a cut.
    """
    trunk_mode = trunk.training
    trunk.eval()
    try:
        reasons = []
        for cut in reversed(_halving(trunk, size)):
            if min(cut.size) < SMALLEST_MAP:
                reasons.append(f"{cut.path} begins at {cut.size[0]}x{cut.size[1]}")
                continue
            if not _carries_everything(trunk, cut, size):
                reasons.append(f"the image reaches the end past {cut.path}")
                continue
            layers = [fresh.get_submodule(path) for path in cut.paths]
            try:
                stage = _at_stride_1(layers[0] if len(layers) == 1 else nn.Sequential(*layers))
                output = stage.eval()(torch.zeros(1, cut.channels, *cut.size))
            except Exception as error:  # any model's forward, at a resolution not its own
                reasons.append(f"{cut.path} at stride 1 fails ({first_line(error)})")
                continue
            stage.train()
            if tuple(output.shape[2:]) == cut.size:
                return cut, stage, output.shape[1]
            reasons.append(f"{cut.path} at stride 1 makes {output.shape[2]}x{output.shape[3]} of "
                           f"{cut.size[0]}x{cut.size[1]}")
    finally:
        trunk.train(trunk_mode)
    raise NoSplit(
        f"{model.architecture} cannot be cut for an attention branch at {size[0]}x{size[1]} pixels:"
        " looked for a stage with convolutions that halves the resolution, begins at "
        f"{SMALLEST_MAP}x{SMALLEST_MAP} places or more, keeps them at stride 1 and through which "
        f"everything passes; found {'; '.join(reasons) or 'no stage that halves it'}. A larger "
        "input_size makes larger maps; or leave abn out")


def _halving(trunk: nn.Module, size: tuple[int, int]) -> list[Cut]:
    """Return the outermost stages that halve the resolution and have convolutions, in call order.

    A pooling of its own in a Sequential (VGG) has its convolutions in the layers before it: the
    stage begins where the resolution changed before, as LeNet-5's does.
    """
    called: _Calls = {}

    def note(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        if len(inputs) != 1 or not all(
                isinstance(t, Tensor) and t.ndim == 4 for t in (inputs[0], output)):
            return
        if tuple(inputs[0].shape[1:]) != (3, *size):  # else: the image itself
            called[name] = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])

    def hook_of(name: str) -> Any:
        return lambda module, inputs, output: note(name, inputs, output)

    hooks = [module.register_forward_hook(hook_of(name))
             for name, module in trunk.named_modules() if name]
    try:
        trunk(torch.zeros(1, 3, *size))
    finally:
        for hook in hooks:
            hook.remove()
    halving = [name for name, (given, left) in called.items()
               if all(out in (into // 2, -(-into // 2))
                      for into, out in zip(given[1:], left[1:], strict=True))]
    cuts = []
    for name in halving:
        paths = _stage(trunk, name, called)
        if (any(_convolves(trunk, path) for path in paths)
                and not any(name.startswith(f"{other}.") for other in halving)):
            channels, height, width = called[paths[0]][0]
            cuts.append(Cut(paths, channels, (height, width)))
    return cuts


def _stage(trunk: nn.Module, name: str, called: _Calls) -> tuple[str, ...]:
    """Return the module `name`, and before it those of its stage where it has no convolutions.

    These are the modules before it in its Sequential at the same resolution.
    """
    parent, _, last = name.rpartition(".")
    siblings = trunk.get_submodule(parent)
    paths = [name]
    if isinstance(siblings, nn.Sequential) and not _convolves(trunk, name):
        before = [name.removesuffix(last) + sibling for sibling, _ in siblings.named_children()]
        for path in reversed(before[:before.index(name)]):
            if path not in called or called[path][0][1:] != called[path][1][1:]:
                break
            paths.insert(0, path)
    return tuple(paths)


def _convolves(trunk: nn.Module, path: str) -> bool:
    return any(isinstance(layer, nn.Conv2d) for layer in trunk.get_submodule(path).modules())


def _carries_everything(trunk: nn.Module, cut: Cut, size: tuple[int, int]) -> bool:
    """Return whether the image reaches the trunk's end through the module at the cut alone."""
    hook = trunk.get_submodule(cut.path).register_forward_pre_hook(
        lambda module, inputs: (torch.zeros_like(inputs[0]),))
    try:
        noise = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        one, other = trunk(noise)
    finally:
        hook.remove()
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-6))


def _at_stride_1(layer: nn.Module) -> nn.Module:
    """Return a stage that keeps the resolution: the given one, changed, or its replacement.

    Strided convolutions, and what else has a stride and no parameters (poolings, blurs), get stride
    1. Where one shrinks its input even so, a convolution is padded as far as it takes (a 2x2 one,
    ConvNeXt's, on the right and below), and anything else is left out (2x2 poolings, also in
    shortcuts).
    """
    for name, child in list(layer.named_children()):
        setattr(layer, name, _at_stride_1(child))
    convolution = isinstance(layer, nn.Conv2d)
    if getattr(layer, "stride", 1) in (1, (1, 1)) or not (
            convolution or next(layer.parameters(), None) is None):
        return layer  # also a block that only notes its convolutions' stride
    strided: Any = layer
    strided.stride = (1, 1)
    # `channels` is how timm's blur names them.
    channels = getattr(layer, "in_channels", None) or getattr(layer, "channels", None) or 1
    side = SMALLEST_MAP
    if layer(torch.zeros(1, channels, side, side)).shape[2:] == (side, side):
        return layer
    if not convolution:
        return nn.Identity()
    strided.padding = "same"
    return layer
