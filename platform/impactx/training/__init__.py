"""The one training loop and its losses, used by both stages and every approach."""

from impactx.training.loop import FitResult, TrainingData, evaluate, fit
from impactx.training.losses import (
           abn_loss,
           classification_loss,
           impactx_loss,
           single_stage_loss,
           wae_loss,
)
from impactx.training.single_stage import train_single_stage
from impactx.training.stages import train_abn, train_ensemble, train_stage1, train_stage2, train_wae
from impactx.training.targets import targets_of

__all__ = ["FitResult", "TrainingData", "abn_loss", "classification_loss", "evaluate", "fit", "impactx_loss",
           "single_stage_loss", "targets_of", "train_abn", "train_ensemble", "train_single_stage", "train_stage1",
           "train_stage2", "train_wae", "wae_loss"]
