"""Trunks from timm: any of its models by name, without its classification layer."""

from __future__ import annotations

import difflib

import torch
from torch import Tensor, nn

from impactx.models.weights import WeightsError, first_line


class UnknownArchitecture(ValueError):
    """A name is neither lenet5 nor a model of timm; the message names the closest ones."""


def check_architecture(name: str) -> None:
    """Check that a name is lenet5 or a model name that timm knows.

    Args:
        name: A tag after a dot (the training that timm's weights come from, as in
            tf_efficientnet_b2.ns_jft_in1k) must be one that timm knows for that architecture.

    Raises:
        UnknownArchitecture: It is neither; the message has close matches.
    """
    if name == "lenet5":
        return
    import timm  # seconds, for every process that has no need of it

    base, _, tag = name.partition(".")
    tagged = timm.list_pretrained(f"{base}.*") if tag else []
    if timm.is_model(base) and (not tag or name in tagged):
        return
    if timm.is_model(base):
        raise UnknownArchitecture(f"unknown tag {tag!r} of the architecture {base}; timm "
                                  f"{timm.__version__} knows: {', '.join(tagged) or 'none'}")
    candidates = ["lenet5", *timm.list_models(), *(timm.list_pretrained() if tag else ())]
    close = difflib.get_close_matches(name, candidates, n=5, cutoff=0.5)
    raise UnknownArchitecture(f"unknown architecture {name!r}: lenet5, or a model of timm "
                              f"{timm.__version__}; close to it: {', '.join(close) or 'none'}")


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of each channel that timm's weights of this name were trained with."""
    import timm

    check_architecture(name)
    config = timm.get_pretrained_cfg(name)
    if config is None:  # an architecture for which timm has no configuration at all
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    return tuple(config.mean), tuple(config.std)


def timm_trunk(name: str, *, pretrained: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """Build a timm model without its classification layer.

    Random weights come from torch's global generator: call it in `seeded`.

    Args:
        name: A model name of timm.
        pretrained: Whether the weights come from the hub (or its local cache). A hub that cannot be
            reached takes timm about a minute unless HF_HUB_OFFLINE=1 is set.

    Returns:
        The trunk, (B, 3, H, W) -> pooled features (B, F), and the names of its classification layer
        in a weights file.

    Raises:
        UnknownArchitecture: There is no such model.
        WeightsError: There are no weights, or the hub cannot be reached.
    """
    import timm

    check_architecture(name)
    config = timm.get_pretrained_cfg(name)
    heads = (getattr(config, "classifier", None) or ()) if config is not None else ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    if pretrained and (config is None or not config.has_weights):
        raise WeightsError(f"timm {timm.__version__} has no pre-trained weights for {name}: set "
                           "weights to random or to a file")
    try:
        trunk = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:
        if not pretrained or config is None:
            raise
        source = config.hf_hub_id and f"https://huggingface.co/{config.hf_hub_id}" or config.url
        raise WeightsError(
            f"the weights of {name} are not in the local cache and cannot be loaded from the hub "
            f"({first_line(error)}).\nWays to provide them: fetch {source} on a machine with a "
            "connection and set weights to that file (model.safetensors); or fill the cache there "
            "(HF_HOME, by default ~/.cache/huggingface) and copy it here; or set HF_ENDPOINT to a "
            "mirror; or set weights to random."
        ) from error
    return trunk, heads


def count_features(trunk: nn.Module, size: tuple[int, int], name: str) -> int:
    """Return the number of a trunk's features, measured on one image; the trunk stays as it was.

    Args:
        trunk: The backbone.
        size: Height and width of the preprocessed images.
        name: The architecture, for messages.

    Raises:
        ValueError: The architecture cannot take such images, or gives no (1, F) features.
    """
    parameter = next(trunk.parameters())
    training = trunk.training
    trunk.eval()
    try:
        with torch.no_grad():
            features: Tensor = trunk(
                torch.zeros(1, 3, *size, dtype=parameter.dtype, device=parameter.device))
    except Exception as error:
        raise ValueError(f"{name} cannot take images of {size[0]}x{size[1]} pixels: {error}\n"
                         f"Set the model's input_size{_native_hint(name)}.") from error
    finally:
        trunk.train(training)
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(
            f"{name} gives features of shape {tuple(features.shape)} for images of "
            f"{size[0]}x{size[1]}, not one vector an image: choose another architecture")
    return features.shape[1]


def _native_hint(name: str) -> str:
    if name == "lenet5":
        return ""
    import timm

    config = timm.get_pretrained_cfg(name)
    return f" (its weights were trained at {config.input_size[-1]})" if config is not None else ""
