"""A field that holds an extension keeps all of its settings when it is written as JSON."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any, Union, get_args

import pytest
from pydantic import BaseModel, SerializeAsAny
from pydantic.functional_serializers import SerializeAsAny as Marker

import impactx
from impactx.approaches.impactx import Impactx
from impactx.approaches.single_stage import SingleStage
from impactx.approaches.wae import Wae
from impactx.settings import extensions
from impactx.settings.extensions import (
    ApproachSettings,
    AttributionSettings,
    MapMetricSettings,
    SourceSettings,
)

BASES = (AttributionSettings, ApproachSettings, SourceSettings, MapMetricSettings)


def bare(annotation: Any, whole: bool = False) -> Iterator[type]:
    """Extensions' base classes in an annotation of which only the base's own fields would be written."""
    if isinstance(annotation, type) and issubclass(annotation, BASES) and not whole:
        yield annotation
    arguments = get_args(annotation)
    whole = whole or any(isinstance(argument, Marker) for argument in arguments)
    for argument in arguments:
        yield from bare(argument, whole)


def models(of: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for kind in of.__subclasses__():
        yield kind
        yield from models(kind)


def test_the_check_finds_what_it_looks_for():
    assert list(bare(Union[AttributionSettings, None])) == [AttributionSettings]  # noqa: UP007
    assert list(bare(list[SourceSettings])) == [SourceSettings]
    assert list(bare(extensions.AnyAttribution)) == list(bare(SerializeAsAny[SourceSettings])) == []
    assert list(bare(Union[extensions.AnyAttribution, None])) == []  # noqa: UP007


def test_every_field_with_an_extension_is_written_whole():
    for module in pkgutil.walk_packages(impactx.__path__, "impactx."):
        importlib.import_module(module.name)
    found = {f"{kind.__module__}.{kind.__name__}.{name}" for kind in models(BaseModel)
             if kind.__module__.startswith("impactx.") for name, field in kind.model_fields.items()
             if list(bare(field.annotation)) and not any(isinstance(one, Marker) for one in field.metadata)}
    assert found == set()


@pytest.mark.parametrize("kind", [Impactx, Wae, SingleStage])
def test_an_approach_keeps_the_settings_of_its_attribution(kind):
    approach = kind(attribution={"method": "occlusion", "window": 3, "stride": 2})
    again = extensions.approach.parse(approach.model_dump(mode="json"))
    assert again == approach and again.attribution.window == 3
