"""Attention Branch Network (Fukui et al., CVPR 2019; DESIGN section 6 and the authors' published code).

The backbone is cut before its last stage that halves the resolution.  From the features F there, an attention
branch makes class scores of its own and a map M in (0, 1); the rest of the backbone, the perception branch, goes on
from F * (1 + M) and gives the prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impactx.models.backbones import timm_trunk
from impactx.models.classifier import Classifier, build_classifier
from impactx.models.lenet5 import LeNet5Trunk
from impactx.models.maps import MapKind
from impactx.models.seeding import seeded
from impactx.models.weights import first_line
from impactx.settings import AbnSettings, ModelSettings

SMALLEST_MAP = 8  # a side of M, in places

_Calls = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # of a module, by its path: the shapes (c, h, w) in and out


class NoSplit(ValueError):
    """A backbone that cannot be cut for an attention branch; the message says what was looked for."""


class AbnOutput(NamedTuple):
    """logits (B, K), by which is predicted; maps: M (B, 1, h, w) in (0, 1); attention_logits (B, K)."""

    logits: Tensor
    maps: Tensor
    attention_logits: Tensor


class AttentionBranch(nn.Module):
    """F (B, c, h, w) -> F * (1 + M), without detaching M.

    stage, BN; 1x1 conv to K, BN, ReLU = S; attention logits: the global average of a 1x1 conv K -> K of S;
    M = sigmoid(BN(3x3 conv K -> 1 of S)).  These convolutions have no bias and start as the authors' do (He, by the
    outputs).  stage: keeps the resolution, gives `channels`.
    """

    def __init__(self, stage: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.stage, self.norm = stage, nn.BatchNorm2d(channels)
        self.to_classes = nn.Conv2d(channels, num_classes, 1, bias=False)
        self.classes_norm = nn.BatchNorm2d(num_classes)
        self.to_logits = nn.Conv2d(num_classes, num_classes, 1, bias=False)
        self.to_map = nn.Conv2d(num_classes, 1, 3, padding=1, bias=False)
        self.map_norm = nn.BatchNorm2d(1)
        for layer in (self.to_classes, self.to_logits, self.to_map):
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / (layer.kernel_size[0] ** 2 * layer.out_channels)))
        self._made: tuple[Tensor, Tensor] | None = None

    def forward(self, features: Tensor) -> Tensor:
        s = F.relu(self.classes_norm(self.to_classes(self.norm(self.stage(features)))))
        attention = torch.sigmoid(self.map_norm(self.to_map(s)))
        self._made = attention, self.to_logits(s).mean(dim=(2, 3))
        return features * (1 + attention)

    def take(self) -> tuple[Tensor, Tensor]:
        """M and the attention logits of the forward just done; they are kept no longer."""
        assert self._made is not None
        made, self._made = self._made, None
        return made


class Abn(nn.Module):
    """x (B, 3, H, W), float, in [0, 1], native size -> AbnOutput.

    a: a classifier in whose trunk an AttentionBranch sits, at the path `where`.  Everything is trained.
    """

    map_kind: MapKind = "attention"

    def __init__(self, a: Classifier, where: str) -> None:
        super().__init__()
        self.a, self.where = a, where

    @property
    def branch(self) -> AttentionBranch:
        """The attention branch."""
        return self.a.trunk.get_submodule(self.where)  # type: ignore[return-value]

    @property
    def num_classes(self) -> int:
        return self.a.num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        """Native (height, width)."""
        return self.a.image_size

    def forward(self, x: Tensor) -> AbnOutput:
        logits = self.a(x)
        return AbnOutput(logits, *self.branch.take())

    def classify(self, x: Tensor) -> Tensor:
        """The perception branch's logits (B, K)."""
        return self(x).logits

    def with_maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, and M enlarged (bilinearly) to the native size, (B, 1, H, W)."""
        found = self(x)
        return found.logits, F.interpolate(found.maps, size=self.image_size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Split:
    """Where a backbone is cut: before the stage made of the modules at `paths`, one after another; its input is
    (channels, *size)."""

    paths: tuple[str, ...]
    channels: int
    size: tuple[int, int]

    @property
    def path(self) -> str:
        """The module before which the cut is."""
        return self.paths[0]


def build_abn(approach: AbnSettings, model: ModelSettings, num_classes: int, image_size: tuple[int, int], *,
              seed: int, load_weights: bool = True) -> Abn:
    """ABN on the CPU: a classifier as `build_classifier` makes it from these arguments, with an attention branch.

    The backbone starts where A starts (pre-trained where A is); the branch's copy of the next stage starts random,
    as in the authors' code.  Raises NoSplit, and what `build_classifier` raises.
    """
    a = build_classifier(model, num_classes, image_size, seed=seed, load_weights=load_weights)
    size = a.preprocess.input_size
    if isinstance(a.trunk, LeNet5Trunk):
        return Abn(a, _branch_lenet5(a.trunk, size, num_classes, seed))
    with seeded(seed, "attention"):
        fresh, _ = timm_trunk(model.architecture, pretrained=False)
    split, stage, channels = _cut(a.trunk, fresh, size, model)
    with seeded(seed, "attention head"):
        branch = AttentionBranch(stage, channels, num_classes)
    parent, _, name = split.path.rpartition(".")
    setattr(a.trunk.get_submodule(parent), name, nn.Sequential(branch, a.trunk.get_submodule(split.path)))
    return Abn(a, f"{split.path}.0")


def _branch_lenet5(trunk: LeNet5Trunk, size: tuple[int, int], num_classes: int, seed: int) -> str:
    """Before the second convolution: its copy is padded, or M would be smaller than F, and has no pooling."""
    height, width = ((side - 4) // 2 for side in size)
    if min(height, width) < SMALLEST_MAP:
        raise NoSplit(f"an attention branch needs features of at least {SMALLEST_MAP}x{SMALLEST_MAP} places before the "
                      f"last stage, lenet5 has {height}x{width} for inputs of {size[0]}x{size[1]} pixels: set the "
                      "model's input_size (32 is its own), or leave abn out")
    with seeded(seed, "attention"):
        stage = nn.Sequential(nn.Conv2d(6, 16, 5, padding=2), nn.ReLU())
    with seeded(seed, "attention head"):
        trunk.between = AttentionBranch(stage, 16, num_classes)
    return "between"


@torch.no_grad()
def _cut(trunk: nn.Module, fresh: nn.Module, size: tuple[int, int], model: ModelSettings
         ) -> tuple[Split, nn.Module, int]:
    """The cut, the stage after it taken from `fresh` and set to stride 1, and that stage's channels."""
    trunk_mode = trunk.training
    trunk.eval()
    try:
        halving = _halving(trunk, size)
        reasons = []
        for split in reversed(halving):
            if min(split.size) < SMALLEST_MAP:
                reasons.append(f"{split.path} begins at {split.size[0]}x{split.size[1]}")
                continue
            if not _carries_everything(trunk, split, size):
                reasons.append(f"the image reaches the end past {split.path}")
                continue
            layers = [fresh.get_submodule(path) for path in split.paths]
            try:
                stage = _at_stride_1(layers[0] if len(layers) == 1 else nn.Sequential(*layers))
                kept = stage.eval()(torch.zeros(1, split.channels, *split.size))
            except Exception as error:  # any model's forward, at a resolution that it may not be made for
                reasons.append(f"{split.path} at stride 1 fails ({first_line(error)})")
                continue
            stage.train()
            if tuple(kept.shape[2:]) == split.size:
                return split, stage, kept.shape[1]
            reasons.append(f"{split.path} at stride 1 makes {kept.shape[2]}x{kept.shape[3]} of "
                           f"{split.size[0]}x{split.size[1]}")
    finally:
        trunk.train(trunk_mode)
    raise NoSplit(f"{model.architecture} cannot be cut for an attention branch at {size[0]}x{size[1]} pixels: "
                  "looked for a stage with convolutions that halves the resolution, begins at "
                  f"{SMALLEST_MAP}x{SMALLEST_MAP} places or more, keeps them at stride 1 and through which everything "
                  f"passes; found {'; '.join(reasons) or 'no stage that halves it'}. A larger input_size makes larger "
                  "maps; or leave abn out")


def _halving(trunk: nn.Module, size: tuple[int, int]) -> list[Split]:
    """The outermost modules that halve the resolution of features and have convolutions, in the order of calls.

    A pooling of its own in a Sequential (VGG) has them from the layers before it: the stage begins where the
    resolution changed before, as LeNet-5's does.
    """
    called: _Calls = {}

    def note(name: str, inputs: tuple, output: object) -> None:
        if (len(inputs) == 1 and all(isinstance(t, Tensor) and t.ndim == 4 for t in (inputs[0], output))
                and tuple(inputs[0].shape[1:]) != (3, *size)):  # else: the image itself
            called[name] = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])  # type: ignore[attr-defined]

    hooks = [module.register_forward_hook(lambda m, i, o, name=name: note(name, i, o))
             for name, module in trunk.named_modules() if name]
    try:
        trunk(torch.zeros(1, 3, *size))
    finally:
        for hook in hooks:
            hook.remove()
    halving = [name for name, (given, made) in called.items()
               if all(m in (g // 2, -(-g // 2)) for g, m in zip(given[1:], made[1:], strict=True))]
    found = []
    for name in halving:
        paths = _stage(trunk, name, called)
        if (any(_convolves(trunk, path) for path in paths)
                and not any(name.startswith(f"{other}.") for other in halving)):
            channels, height, width = called[paths[0]][0]
            found.append(Split(paths, channels, (height, width)))
    return found


def _stage(trunk: nn.Module, name: str, called: _Calls) -> tuple[str, ...]:
    """The module `name`; before it, where it has no convolutions, those of its Sequential at the same resolution."""
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


def _carries_everything(trunk: nn.Module, split: Split, size: tuple[int, int]) -> bool:
    """True where nothing of the image reaches the trunk's end but through the module at the cut."""
    hook = trunk.get_submodule(split.path).register_forward_pre_hook(lambda m, i: (torch.zeros_like(i[0]),))
    try:
        noise = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        one, other = trunk(noise)
    finally:
        hook.remove()
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-6))


def _at_stride_1(layer: nn.Module) -> nn.Module:
    """A stage that keeps the resolution: the given one, changed, or what stands in its place.

    Its strided convolutions, and what else has a stride and no parameters (poolings, blurs), get stride 1.  Where one
    shrinks its input even so, a convolution is padded as far as it takes (of a 2x2 one, ConvNeXt's: right and below),
    and anything else is left out (2x2 poolings, also in shortcuts).
    """
    for name, child in list(layer.named_children()):
        setattr(layer, name, _at_stride_1(child))
    convolution = isinstance(layer, nn.Conv2d)
    if getattr(layer, "stride", 1) in (1, (1, 1)) or not (convolution or next(layer.parameters(), None) is None):
        return layer  # also a block that only notes its convolutions' stride
    layer.stride = (1, 1)
    channels = getattr(layer, "in_channels", None) or getattr(layer, "channels", None) or 1  # the latter: timm's blur
    side = SMALLEST_MAP
    if layer(torch.zeros(1, channels, side, side)).shape[2:] == (side, side):
        return layer
    if not convolution:
        return nn.Identity()
    layer.padding = "same"
    return layer
