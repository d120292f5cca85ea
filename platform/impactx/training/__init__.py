"""The one training loop and its losses, used by both stages and every approach."""

from impactx.training.loop import FitResult, TrainingData, evaluate, fit
from impactx.training.losses import classification_loss, impactx_loss
from impactx.training.stages import train_stage1, train_stage2

__all__ = ["FitResult", "TrainingData", "classification_loss", "evaluate", "fit", "impactx_loss", "train_stage1",
           "train_stage2"]
