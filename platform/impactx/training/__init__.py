"""The one training loop, and what the losses of the approaches have in common."""

from impactx.training.loop import FitResult, LoopArguments, TrainingData, evaluate, fit
from impactx.training.losses import Loss, classification_loss, cross_entropy
from impactx.training.parts import device_parts, dtype_of, fit_best

__all__ = [
    "FitResult", "LoopArguments", "Loss", "TrainingData", "classification_loss", "cross_entropy",
    "device_parts", "dtype_of", "evaluate", "fit", "fit_best",
]
