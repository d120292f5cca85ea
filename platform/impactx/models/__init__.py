"""The models: classifiers A (LeNet-5, timm), IMPACTX around them, what it is compared with, their checkpoints.

Images go in as float (B, 3, H, W) with values in [0, 1] at native size; a model carries its own resize and
normalisation.  Every model has `num_classes`, `image_size` and `classify`, images -> logits (B, K); where `takes_maps`
is there and true, `classify` takes a map for each image as well.  Where a model makes maps, `with_maps` gives logits
and maps (B, C, H, W) at native size; where it makes or takes any, `map_kind` says what they are (models.maps).
"""

from impactx.models.abn import Abn, AbnOutput, NoSplit, build_abn
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
from impactx.models.ensemble import Ensemble
from impactx.models.impactx import Impactx, LatentExplanationPredictor, build_impactx
from impactx.models.maps import MapKind, map_kind
from impactx.models.preprocess import Preprocess
from impactx.models.seeding import seeded
from impactx.models.single_stage import SingleStageImpactx, build_single_stage
from impactx.models.wae import Wae, build_wae
from impactx.models.weights import WeightsError

__all__ = [
    "Abn", "AbnOutput", "CheckpointError", "Classifier", "Decoder", "Ensemble", "Impactx", "Kind",
    "LatentExplanationPredictor", "Loaded", "MapKind", "NoSplit", "Preprocess", "SingleStageImpactx",
    "UnknownArchitecture", "Wae", "WeightsError", "build_abn", "build_classifier", "build_impactx",
    "build_single_stage", "build_trunk", "build_wae", "check_architecture", "decoder_sizes", "load_checkpoint",
    "map_kind", "register_kind", "save_checkpoint", "seeded", "weights_fingerprint",
]
