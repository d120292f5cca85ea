"""The classifier A (LeNet-5, timm) and the parts that the networks of several approaches share.

Images go in as float (B, 3, H, W) with values in [0, 1] at native size; a model carries its own
resize and normalisation. Every model has `num_classes`, `image_size` and `classify`, images ->
logits (B, K); where `takes_maps` is true, `classify` takes a map for each image as well. Where a
model makes maps, `with_maps` gives logits and maps (B, C, H, W) at native size; where it makes or
takes any, `map_kind` says what they are (`models.maps`).
"""

from impactx.models.backbones import UnknownArchitecture, check_architecture
from impactx.models.classifier import Classifier, build_classifier, build_trunk
from impactx.models.decoder import Decoder, decoder_sizes
from impactx.models.maps import MapKind, map_kind
from impactx.models.preprocess import Preprocess
from impactx.models.seeding import seeded
from impactx.models.weights import WeightsError, weights_fingerprint

__all__ = [
    "Classifier", "Decoder", "MapKind", "Preprocess", "UnknownArchitecture", "WeightsError",
    "build_classifier", "build_trunk", "check_architecture", "decoder_sizes", "map_kind", "seeded",
    "weights_fingerprint",
]
