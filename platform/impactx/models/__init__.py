"""The models: classifiers A (LeNet-5, timm), IMPACTX around them, their checkpoints.

Images go in as float (B, 3, H, W) with values in [0, 1] at native size; a model carries its own resize and
normalisation.
"""

from impactx.models.backbones import UnknownArchitecture, check_architecture
from impactx.models.checkpoint import (
    CheckpointError,
    Kind,
    Loaded,
    load_checkpoint,
    register_kind,
    save_checkpoint,
    weights_fingerprint,
)
from impactx.models.classifier import Classifier, build_classifier, build_trunk
from impactx.models.decoder import Decoder, decoder_sizes
from impactx.models.impactx import Impactx, LatentExplanationPredictor, build_impactx
from impactx.models.preprocess import Preprocess
from impactx.models.seeding import seeded
from impactx.models.weights import WeightsError

__all__ = [
    "CheckpointError", "Classifier", "Decoder", "Impactx", "Kind", "LatentExplanationPredictor", "Loaded",
    "Preprocess", "UnknownArchitecture", "WeightsError", "build_classifier", "build_impactx", "build_trunk",
    "check_architecture", "decoder_sizes", "load_checkpoint", "register_kind", "save_checkpoint", "seeded",
    "weights_fingerprint",
]
