"""Pre-trained weights from a file: reading it, assigning its tensors, saying what does not fit."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from impactx.fetching import fetch_file, is_remote
from impactx.storage import StorageError

CHECKPOINT_FORMAT = "impactx-checkpoint"
SHOWN = 10  # tensors of each sort that a message lists
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order of preference
_ROLES = {"weight", "bias", "running_mean", "running_var"}


class WeightsError(ValueError):
    """Weights cannot be had or do not fit; the message says which tensors and what to do."""


@dataclasses.dataclass(frozen=True)
class Misfit:
    """What keeps a set of tensors from fitting a model; true where anything does.

    Attributes:
        missing: Names that the model has and the set has not.
        unexpected: Names that the set has and the model has not.
        shapes: One line for each tensor of another shape or role.
        counts: A line about different numbers of tensors.
    """

    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    shapes: Sequence[str] = ()
    counts: str = ""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes or self.counts)

    def __str__(self) -> str:
        parts = [f"  {self.counts}"] if self.counts else []
        for title, lines in (("missing", self.missing), ("unexpected", self.unexpected),
                             ("not matching", self.shapes)):
            if lines:
                more = f", and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
                parts.append(f"  {len(lines)} {title}: {'; '.join(lines[:SHOWN])}{more}")
        return "\n".join(parts)


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What was taken from a weights file.

    Attributes:
        path: Of the file.
        loaded: Number of tensors that were taken.
        left_out: Names of the head's tensors, which were not.
    """

    path: str
    loaded: int
    left_out: Sequence[str]

    def __str__(self) -> str:
        text = f"{self.loaded} tensors from {self.path}"
        if self.left_out:
            text += ("; the file's own classification head was left out: "
                     f"{', '.join(self.left_out)}")
        return text


def compare_tensors(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Misfit:
    """Compare names and shapes of given tensors with those of a model."""
    return Misfit(
        missing=[name for name in wanted if name not in given],
        unexpected=[name for name in given if name not in wanted],
        shapes=[f"{name} {tuple(given[name].shape)}, the model has {tuple(wanted[name].shape)}"
                for name in wanted if name in given and given[name].shape != wanted[name].shape])


def read_weights_file(path: str | Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Return the named tensors of a .pth, .pt or .safetensors file; no code in it runs.

    A training checkpoint's {"state_dict": ...} or {"model": ...} is unwrapped (the averaged weights
    first, as timm does), and the prefix "module." that data-parallel training leaves is removed.

    Args:
        path: A local path; or an s3:// address, which is fetched once a node.
        sha256: In hex, of the file that is meant; None: whatever file is there.

    Raises:
        WeightsError: There is no such file, it is another one, has another ending, cannot be read,
            has no tensors, or values that are not finite.
    """
    if is_remote(path):
        try:
            path = fetch_file(str(path))
        except (FileNotFoundError, StorageError) as error:
            raise WeightsError(str(error)) from error
    path = Path(path).expanduser()
    if not path.is_file():
        raise WeightsError(f"no weights file at {path.absolute()}: set weights to an existing .pth,"
                           " .pt or .safetensors file, or to hub or random")
    content: Any
    try:
        stored = path.read_bytes()  # once: what is checked is what is loaded
        if sha256 is not None and (present := hashlib.sha256(stored).hexdigest()) != sha256:
            raise WeightsError(
                f"{path} is another file than the one that is meant: its SHA-256 is {present}, and "
                f"not {sha256}: put that file back on every node, or start the job anew with this "
                "one")
        if path.suffix == ".safetensors":
            from safetensors.torch import load
            content = load(stored)
        elif path.suffix in (".pth", ".pt"):
            content = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
        else:
            raise WeightsError(f"{path}: weights are read from .pth, .pt and .safetensors files")
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} is damaged, or holds Python objects beside tensors, which are "
                           "not loaded for safety: save the model's state_dict() alone. "
                           f"({first_line(error)})") from error
    except Exception as error:  # torch and safetensors have no common class for "not such a file"
        raise WeightsError(
            f"{path} cannot be read as a weights file: {first_line(error)}") from error
    if isinstance(content, Mapping) and content.get("format") == CHECKPOINT_FORMAT:
        raise WeightsError(
            f"{path} is a checkpoint of this package: read it with load_checkpoint")
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    is_state = isinstance(content, Mapping) and all(
        isinstance(value, Tensor) for value in content.values())
    if not is_state or not content:
        raise WeightsError(
            f"{path} holds no state_dict (named tensors), but {type(content).__name__}")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    bad = [name for name, tensor in content.items()
           if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if bad:
        raise WeightsError(f"{path} holds values that are not finite in {len(bad)} tensors: "
                           f"{', '.join(bad[:SHOWN])}")
    return dict(content)


def match_by_name(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor],
                  head_names: Sequence[str]) -> tuple[dict[str, Tensor], list[str], Misfit]:
    """Match tensors by equal names; the counters num_batches_tracked may be absent.

    Args:
        wanted: The tensors of the model.
        given: The tensors of the file.
        head_names: Prefixes of the file's classification layer.

    Returns:
        The tensors for the model, the names that were left out because they belong to the head, and
        what does not fit.
    """
    left_out = [name for name in given
                if name not in wanted and name.startswith(tuple(f"{head}." for head in head_names))]
    rest = {name: tensor for name, tensor in given.items() if name not in left_out}
    needed = {name: t for name, t in wanted.items() if name in rest or not _is_counter(name)}
    return rest, left_out, compare_tensors(needed, rest)


def match_by_order(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor],
                   head_names: Sequence[str]) -> tuple[dict[str, Tensor], list[str], Misfit]:
    """Match tensors by position: the i-th tensor of the file for the i-th of the model.

    num_batches_tracked is left out on both sides; a weight and a bias for each head at the file's
    end are left out as well if the file has just so many tensors more. Shapes are compared one by
    one, and so are the last parts of the names where both are among weight, bias, running_mean,
    running_var: those four often have one shape.

    Args:
        wanted: The tensors of the model.
        given: The tensors of the file.
        head_names: Prefixes of the file's classification layer.

    Returns:
        The same as `match_by_name`.
    """
    names = [name for name in wanted if not _is_counter(name)]
    items = [(name, tensor) for name, tensor in given.items() if not _is_counter(name)]
    if len(items) not in (len(names), len(names) + 2 * len(head_names)):
        return {}, [], Misfit(counts=f"{len(items)} tensors in the file, {len(names)} in the model"
                                     f" and {2 * len(head_names)} in the head that is left out")
    left_out = [name for name, _ in items[len(names):]]
    shapes, matched = [], {}
    for position, (name, (source, tensor)) in enumerate(zip(names, items, strict=False)):
        role, source_role = name.rpartition(".")[2], source.rpartition(".")[2]
        same_role = role == source_role or not {role, source_role} <= _ROLES
        if tensor.shape != wanted[name].shape or not same_role:
            shapes.append(f"tensor {position + 1} is {source} {tuple(tensor.shape)}, the model "
                          f"has {name} {tuple(wanted[name].shape)}")
        matched[name] = tensor
    return matched, left_out, Misfit(shapes=shapes)


def load_trunk_file(trunk: nn.Module, path: str | Path,
                    match: Literal["names", "order"] = "names", *, model_name: str,
                    head_names: Sequence[str] = (), sha256: str | None = None) -> LoadReport:
    """Fill a trunk in place with all its tensors from a file, or change nothing.

    Args:
        trunk: The backbone.
        path: Of the weights file, see `read_weights_file`, whose errors are raised.
        match: How tensors are assigned. "order" is for files whose names differ; a .safetensors
            file does not keep the order of its tensors and is refused there.
        model_name: The architecture, for messages.
        head_names: Prefixes of the classification layer that the file may hold beside the trunk:
            they are left out, whatever their number of classes, and named in the report.
        sha256: See `read_weights_file`.

    Raises:
        WeightsError: The file does not fit.
    """
    given = read_weights_file(path, sha256)
    ordered = Path(path).suffix != ".safetensors"
    if match == "order" and not ordered:
        raise WeightsError(f"{path}: a .safetensors file does not keep the order of its tensors; "
                           "set weights_match to names, or use a .pth file")
    wanted = trunk.state_dict()
    rules = {"names": match_by_name, "order": match_by_order}
    matched, left_out, misfit = rules.pop(match)(wanted, given, head_names)
    if misfit:
        (other, rule), = rules.items()
        fits = (other == "names" or ordered) and not rule(wanted, given, head_names)[2]
        hint = (f"\nIn the {other} of its tensors the file fits: set weights_match to {other}."
                if fits else "")
        raise WeightsError(
            f"{path} does not fit {model_name} (weights_match: {match}):\n{misfit}{hint}")
    trunk.load_state_dict(matched, strict=False)
    return LoadReport(str(path), len(matched), left_out)


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a contiguous copy of a tensor on the CPU, without its history."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def weights_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 (hex) over names, dtypes, shapes and bytes of a model's state dict.

    Device and order do not matter. The normalisation is part of it; the size to which the model
    resizes its input is not: that is a setting.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(on_cpu(tensor).reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
