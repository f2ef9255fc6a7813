"""A stand-in for `ml_collections`, for machines without it: config files that only need `ConfigDict` work unchanged.

`mmdiff.config` puts this module in its place when the real one is not installed; nothing else uses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any


class ConfigDict(MutableMapping):
    """A nested dict whose keys are attributes too: sorted, of fixed types, and closed to new keys once locked.

        config = ConfigDict({"train": {"steps": 100}})
        config.train.steps = 200

    What it has behaves as in `ml_collections.ConfigDict`; references, placeholders and frozen or YAML forms are left out.

    Raises:
      AttributeError: an attribute that does not exist, or a new one of a locked config (KeyError for items).
      TypeError: a value of another type than the one it replaces. An int may replace a float, lists and tuples replace each other.
    """

    def __init__(self, values: Mapping[str, Any] | None = None):
        # Past __setattr__, which is for values.
        vars(self).update(_fields={}, _locked=False, _type_safe=True)
        self.update(values or {})

    def __getitem__(self, key: str) -> Any:
        return self._fields[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if "." in key:
            raise ValueError(f"a key of a config has no dots: {key!r}.")
        if self._locked and key not in self._fields:
            raise KeyError(f"{key!r} does not exist, and the config is locked.")
        if isinstance(value, dict):
            value = ConfigDict(value)
        if key in self._fields:
            value = self._cast(key, value, type(self._fields[key]))
        self._fields[key] = value

    def _cast(self, key: str, value: Any, kind: type) -> Any:
        for given, wanted in ((int, float), (tuple, list), (list, tuple)):
            if isinstance(value, given) and kind is wanted:
                return kind(value)
        if self._type_safe and not isinstance(value, kind) and value is not None and kind is not type(None):
            raise TypeError(f"{key!r} is a {kind.__name__} and cannot become {value!r}")
        return value

    def __delitem__(self, key: str) -> None:
        if self._locked:
            raise KeyError(f"{key!r} cannot be deleted: the config is locked.")
        del self._fields[key]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._fields))

    def __len__(self) -> int:
        return len(self._fields)

    def __getattr__(self, key: str) -> Any:
        try:
            return vars(self)["_fields"][key]
        except KeyError as error:
            raise AttributeError(f"the config has no value {key!r}.") from error

    def __setattr__(self, key: str, value: Any) -> None:
        try:
            self[key] = value
        except KeyError as error:
            raise AttributeError(*error.args) from error

    def __repr__(self) -> str:
        return f"ConfigDict({self.to_dict()!r})"

    def keys(self) -> list[str]:
        return list(self)

    def values(self) -> list[Any]:
        return [self[key] for key in self]

    def items(self) -> list[tuple[str, Any]]:
        return [(key, self[key]) for key in self]

    def update(self, values: Mapping[str, Any]) -> None:
        """Sets values; those of a section that exists are set within it."""
        for key, value in values.items():
            if isinstance(value, Mapping) and isinstance(self._fields.get(key), ConfigDict):
                self[key].update(value)
            else:
                self[key] = value

    def get_type(self, key: str) -> type:
        """The type of a value."""
        return type(getattr(self, key))

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts."""
        return {key: value.to_dict() if isinstance(value, ConfigDict) else value for key, value in self.items()}

    @property
    def is_locked(self) -> bool:
        return self._locked

    def lock(self) -> ConfigDict:
        """Closes it, and all sections, to new keys."""
        return self._set(_locked=True)

    @contextlib.contextmanager
    def unlocked(self) -> Iterator[ConfigDict]:
        """A context that takes new keys."""
        before = self._locked
        try:
            yield self._set(_locked=False)
        finally:
            self._set(_locked=before)

    @contextlib.contextmanager
    def ignore_type(self) -> Iterator[ConfigDict]:
        """A context in which values may change their type."""
        try:
            yield self._set(_type_safe=False)
        finally:
            self._set(_type_safe=True)

    def _set(self, **flags: bool) -> ConfigDict:
        vars(self).update(flags)
        for value in self._fields.values():
            if isinstance(value, ConfigDict):
                value._set(**flags)
        return self
