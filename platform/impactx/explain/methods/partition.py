"""SHAP's partition values, computed by the batched engine for many images at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from torch import nn

from impactx.explain.attribution import AttributionError, Explanations, attribution
from impactx.explain.partition.cache import FastForm
from impactx.explain.partition.engine import AdditivityError, partition_shap
from impactx.explain.partition.fast import FastScore
from impactx.explain.partition.forward import PartitionError
from impactx.explain.partition.settings import PartitionValues
from impactx.explain.precision import forward_precision, map_error
from impactx.explain.scores import Probabilities, Score, names_of, training_part
from impactx.settings.base import Precision

COMPARED = 2  # images of each call that are explained in float32 as well, in another precision


@attribution
class Partition(PartitionValues):
    """SHAP's partition explainer (paper 4.2: 2000 evaluations; the rest ours), in batches."""

    method: Literal["partition"] = "partition"
    precision: Precision = Field("float32", description=(
        "of the model's forward: float32 is exact; tf32 and bfloat16 are faster on a GPU and give "
        "other values, whose distance from float32's is measured in every shard and reported"))

    fast: bool = Field(True, description=(
        "whether the model may run in a faster form of the same scores, which is checked against "
        "the model itself in every shard (docs/METHOD.md); false: as it is, always"))

    _fast: FastForm = PrivateAttr(default_factory=FastForm)

    def described(self) -> dict[str, Any]:
        """See `Attribution.described`.

        At their defaults precision and `fast` are left out, so that the keys of stores from before
        there was a choice do not change.
        """
        exclude = {name for name in ("precision", "fast")
                   if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump(mode="json", exclude=exclude)

    def weighted_evaluations(self, size: tuple[int, int] | None, num_classes: int) -> int | None:
        """See `Attribution.weighted_evaluations`: one run explains the weighted sum itself."""
        return self.evaluations(size)

    def explain(
        self, score: Score, images: np.ndarray, labels: np.ndarray, *,
        device: torch.device | str = "cpu", memory_bytes: int = 2**29,
        indices: np.ndarray | None = None,
    ) -> Explanations:
        """See `Attribution.explain`."""
        return self._explain(score, images, labels, device, memory_bytes, indices)

    def explain_weighted(
        self, score: Score, images: np.ndarray, weights: np.ndarray, *,
        device: torch.device | str = "cpu", memory_bytes: int = 2**29,
        indices: np.ndarray | None = None,
    ) -> Explanations:
        """See `Attribution.explain_weighted`.

        The explained function is g(x) = sum_k w_k f_k(x), with weights that are fixed for an image.
        Owen values are linear in the score, so its map is the sum of the class maps that the boxes
        of one run give. (Runs for each class would split other boxes and cost K times as much.)
        """
        return self._explain(score, images, weights, device, memory_bytes, indices)

    def _explain(
        self, score: Score, images: np.ndarray, outputs: np.ndarray, device: torch.device | str,
        memory_bytes: int, indices: np.ndarray | None,
    ) -> Explanations:
        """Explain by the outputs that `partition_shap` takes: labels (N,) or weights (N, K)."""
        names = names_of(indices, len(images))
        try:
            explanations = self._run(score, images, outputs, self.precision, device, memory_bytes,
                                     names)
            if self.precision == "float32":
                return explanations
            exact = self._run(score, images[:COMPARED], outputs[:COMPARED], "float32", device,
                              memory_bytes, names[:COMPARED])
        except (PartitionError, AdditivityError) as error:
            raise AttributionError(str(error)) from error
        return replace(explanations,
                       precision_error=map_error(explanations.maps[:COMPARED], exact.maps))

    def _run(
        self, score: Score, images: np.ndarray, outputs: np.ndarray, precision: Precision,
        device: torch.device | str, memory_bytes: int, names: list[int],
    ) -> Explanations:
        # Copies: images and labels may be read-only files.
        stack = torch.from_numpy(np.array(images)).to(device)
        explained = self._explained(score, images.shape[1:], precision)
        # TF32 is float32 on a CPU.
        exact = precision == "float32" or (
            precision == "tf32" and torch.device(device).type == "cpu")
        with forward_precision(precision, device):
            result = partition_shap(
                explained, stack, torch.from_numpy(np.array(outputs)), masker=self.masker,
                max_evals=self.max_evals, batch_size=self.batch_size,
                fixed_context=self.fixed_context, memory_limit_bytes=memory_bytes, names=names,
                check=exact)
        return Explanations(np.ascontiguousarray(result.values[:, 0], dtype=np.float32),
                            np.asarray(result.scores[:, 0], np.float64),
                            np.asarray(result.base_values[:, 0], np.float64))

    def _explained(self, score: Score, size: tuple[int, ...], precision: Precision
                   ) -> Score | FastScore:
        """Return the explained score, in the form that runs fastest where it may be used.

        It may not in bfloat16, as its layouts are chosen for float32; nor with a fixed context,
        where interactions are differences of four scores, in which its other rounding shows: up to
        1.8e-5 of a map's maximum (docs/LOG.md).
        """
        probability = self.explained_score == "probability"
        if (part := training_part(score)) is not None:
            raise PartitionError(f"{part} is in training mode (dropout, batch statistics): call "
                                 "eval() first")
        if isinstance(score, nn.Module) and self.fast and self.fixed_context is None \
                and precision != "bfloat16":
            height, width, channels = size
            return self._fast.of(score, (channels, height, width), probability)
        return Probabilities(score) if probability else score
