"""Extensions and their names: attributions, approaches, data sources, metrics of maps.

An extension is one class: a `Settings` with a name of its own, whose fields are what a user can set
and whose methods are what it does. A decorator makes it known; configurations, `--help` and
docs/SETTINGS.md find it by its registry.
"""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BeforeValidator, SerializeAsAny
from pydantic_core import PydanticCustomError

from impactx.settings.base import Settings

E = TypeVar("E", bound=Settings)
# Names of the modules of plugins, joined by commas: `impactx.plugins` sets it for the processes of
# a cluster, which are started without a command line of ours.
PLUGINS_VARIABLE = "IMPACTX_PLUGINS"
UNKNOWN, UNNAMED = "unknown_extension", "unnamed_extension"  # types of pydantic's errors


class RegistrationError(ValueError):
    """A class cannot be registered; the message names it, the reason and the remedy."""


class Registry(Generic[E]):
    """The extensions of one kind, by name.

    Args:
        kind: What messages call one, such as "attribution".
        tag: The field that names an extension in a configuration, such as "method".
        packages: Where the built-in ones are: names of packages, all of whose modules are imported
            at the first look.
        default: The name of plain data without a tag; None: the tag must be given.

    A registry is the decorator of its extensions:

        @attribution
        class Occlusion(Attribution):
            method: Literal["occlusion"] = "occlusion"
    """

    def __init__(self, kind: str, tag: str, packages: Sequence[str] = (),
                 default: str | None = None) -> None:
        self.kind, self.tag, self.default = kind, tag, default
        self._packages = list(packages)
        self._classes: dict[str, type[E]] = {}

    def __call__(self, extension: type[E]) -> type[E]:
        """Register a class by the default of its tag, and return it.

        Raises:
            RegistrationError: The tag has no default, or the name is taken.
        """
        where = f"{extension.__module__}.{extension.__qualname__}"
        field = extension.model_fields.get(self.tag)
        name = None if field is None else field.default
        if not isinstance(name, str) or not name:
            raise RegistrationError(
                f"{where}: the {self.kind} needs a name: write {self.tag}: Literal[\"my_name\"] = "
                "\"my_name\" in the class")
        taken = self._classes.get(name)
        if taken is not None and where != (other := f"{taken.__module__}.{taken.__qualname__}"):
            raise RegistrationError(f"{where}: the {self.kind} {name!r} is {other} already: choose "
                                    "another name")
        self._classes[name] = extension
        return extension

    def names(self) -> list[str]:
        """Return the names of all registered extensions, sorted."""
        return list(self.classes())

    def classes(self) -> dict[str, type[E]]:
        """Return the classes of all registered extensions by their names, in their order."""
        self._load()
        return dict(sorted(self._classes.items()))

    def get(self, name: str) -> type[E]:
        """Return the class of a name.

        Raises:
            KeyError: There is no such extension; the message offers a close name.
        """
        self._load()
        if name not in self._classes:
            raise KeyError(self._unknown(name))
        return self._classes[name]

    def parse(self, value: Any) -> Any:
        """Return the extension that plain data describe.

        Args:
            value: A mapping with the tag and any of the extension's settings. An extension is
                returned as it is; anything else is returned too, for pydantic to refuse.

        Raises:
            PydanticCustomError: The tag is missing or names nothing.
            pydantic.ValidationError: The settings are wrong.
        """
        if not isinstance(value, Mapping):
            return value
        name = value.get(self.tag, self.default)
        if name is None:
            raise PydanticCustomError(UNNAMED, "{message}", {
                "tag": self.tag, "names": self.names(),
                "message": f"{self.tag} is missing; there are {', '.join(self.names())}"})
        self._load()
        if not isinstance(name, str) or name not in self._classes:
            raise PydanticCustomError(UNKNOWN, "{message}", {
                "tag": self.tag, "value": name, "names": self.names(),
                "message": self._unknown(str(name))})
        return self._classes[name].model_validate(value)

    def field(self, base: type[E]) -> Any:
        """Return the annotation of a field that holds any extension of this kind.

        Args:
            base: The class that all extensions of the kind have in common.
        """
        # mypy accepts no annotation that is made at run time.
        return Annotated[
            SerializeAsAny[base], BeforeValidator(self.parse)]  # type: ignore[misc,valid-type]

    def _unknown(self, name: str) -> str:
        close = difflib.get_close_matches(name, self._classes, n=1)
        return (f"no such {self.kind}; " + (f"did you mean {close[0]!r}? " if close else "")
                + f"there are {', '.join(sorted(self._classes))}")

    def _load(self) -> None:
        """Import the modules of the built-in extensions, once, and of this process's plugins."""
        while self._packages:
            name = self._packages.pop()
            package = importlib.import_module(name)
            for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
                importlib.import_module(module.name)
        for name in filter(None, os.environ.get(PLUGINS_VARIABLE, "").split(",")):
            importlib.import_module(name)
