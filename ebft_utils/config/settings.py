"""Reading settings: YAML and dotted overrides into nested dataclasses, strictly.

What the settings mean is not known here: see data.py, sections.py and modes.py.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import yaml


class UserError(Exception):
    """An error that the user can fix: shown as one message, without a traceback."""


class ConfigError(UserError):
    """A wrong configuration value.

    key: the dotted key. reason: what is wrong and what would be right. related: other keys that are involved.
    """

    def __init__(self, key: str, reason: str, related: tuple[str, ...] = ()):
        super().__init__(f"{key}: {reason}")
        self.keys = (key, *related)


def option(default, description: str, minimum=None, maximum=None, above=None):
    """A dataclass field with its description (and unit), and the bounds of its value (or of each value of a list)."""
    metadata = {"description": description, "minimum": minimum, "maximum": maximum, "above": above}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type, description: str):
    """A field that holds a section inside another section, with its defaults."""
    return dataclasses.field(default_factory=kind, metadata={"description": description})


class Section:
    """Base of all (nested) settings dataclasses."""


class _UnknownKey(Exception):
    """A dotted key that there is not."""


def read_settings(kind: type, file: str, overrides: typing.Sequence[str], explain_unknown: Callable[[str], str]):
    """An instance of the dataclass `kind` from a YAML file and `section.key=value` overrides.

    Every key and value is checked. Raises UserError with file (or override), key, value and what is allowed.
    explain_unknown: what to say of a dotted key that there is not.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--cfg {file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--cfg {file}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
    tree = _parse_yaml(text, f"--cfg {file}")
    if not isinstance(tree, dict):
        raise UserError(f"--cfg {file}: holds no sections; allowed: {', '.join(_fields(kind))}")
    overridden_keys = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        path = dotted.split(".")
        if not equals or not all(path):
            form = "section.key=value, without spaces"
            raise UserError(f"command line: {override!r} is not of the form {form}{_instead_of(override, kind)}")
        node = tree
        for name in path[:-1]:
            if not isinstance(node.get(name), dict):
                node[name] = {}
            node = node[name]
        node[path[-1]] = _parse_override(text, alternatives(_hint_at(kind, path)), f"command line: {override!r}")
        overridden_keys.append(dotted)
    try:
        return _build(kind, tree, "")
    except _UnknownKey as unknown:
        error = ConfigError(str(unknown), f"unknown key; {explain_unknown(str(unknown))}")
    except ConfigError as refused:
        error = refused
    pairs = [(f"{culprit}.", key) for culprit in error.keys for key in overridden_keys]
    overridden = any(
        culprit.startswith((f"{key}.", f"{key}[")) or f"{key}.".startswith(culprit) for culprit, key in pairs
    )
    raise UserError(f"{'command line' if overridden else file}: {error}")


def _instead_of(override: str, kind: type) -> str:
    """What was probably meant by an argument without `=`, for the end of a message."""
    if override in keys_of(kind):
        return f": {override}=VALUE"
    return f"; the configuration is given as --cfg {override}" if override.endswith((".yaml", ".yml")) else ""


def keys_of(kind: type, prefix: str = "") -> list[str]:
    """All dotted keys of a (nested) settings dataclass, its sections' own too; the entries of a list are `key[]`."""
    hints, found = typing.get_type_hints(kind), []
    for name in _fields(kind):
        found.append(f"{prefix}{name}")
        for alternative in alternatives(hints[name]):
            inner, mark = alternative, ""
            if typing.get_origin(alternative) is list:
                (inner,), mark = typing.get_args(alternative), "[]"
            if dataclasses.is_dataclass(inner):
                found += keys_of(inner, f"{prefix}{name}{mark}.")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# YAML


@dataclasses.dataclass(frozen=True)
class _Written:
    """A number or a bool of YAML, with the text that was written. A setting that takes text takes that text."""

    value: object
    text: str


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML would silently keep the last one. Dates are text."""

    yaml_implicit_resolvers: ClassVar[dict] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        keys = [_as_text(self.construct_object(key, deep=True)) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} is given twice", node.start_mark)
        return {_as_text(key): value for key, value in super().construct_mapping(node, deep).items()}


def _keeping_the_text(construct):
    def constructor(loader, node):
        try:
            return _Written(construct(loader, node), node.value)
        except ValueError:  # a whole number of more digits than Python reads
            return node.value

    return constructor


EMPTY = object()  # `key:` without a value; a written null is None
EXPONENT = re.compile(r"\d+(\.\d+)?[eE]\+?\d+")
_StrictLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None if node.value else EMPTY)
for _name in ("int", "float", "bool"):
    _construct = getattr(yaml.SafeLoader, f"construct_yaml_{_name}")
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_name}", _keeping_the_text(_construct))


def _parse_yaml(text: str, source: str):
    try:
        return yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source}: is not valid YAML: {' '.join(str(error).split())}") from None


def _parse_override(text: str, kinds: tuple, source: str):
    """The value of an override. kinds: the types that the setting may have; none for a key that does not exist.

    Text stands for itself where YAML would read something else into it (*, &, @, a comment, a mapping). Quotes around
    the whole of it are YAML's, null is null, and [a, b] or a,b is a list where the setting takes one.
    """
    items = items_of(kinds)
    if items and "," in text and text[0] not in "[{'\"":
        return [_parse_override(item.strip(), items, source) for item in text.split(",")]
    if kinds and str not in kinds:
        return _parse_yaml(text, source)
    try:
        node = yaml.compose(text, _StrictLoader)
    except yaml.YAMLError:
        return text
    if items and isinstance(node, yaml.SequenceNode) and node.end_mark.index == len(text.rstrip()):
        return _parse_yaml(text, source)
    quoted = isinstance(node, yaml.ScalarNode) and node.style in ("'", '"') and text[:1] == node.style
    if quoted and node.end_mark.index == len(text):
        return node.value
    null = isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null" and node.value == text
    return None if null or not text else text


def _hint_at(cls, path: list[str]):
    """The type hint of the setting at a dotted path, or an empty union where there is no such setting."""
    for name in path[:-1]:
        hint = typing.get_type_hints(cls).get(name) if name in _fields(cls) else None
        cls = next((kind for kind in alternatives(hint) if dataclasses.is_dataclass(kind)), None)
        if cls is None:
            return typing.Never
    return typing.get_type_hints(cls)[path[-1]] if path[-1] in _fields(cls) else typing.Never


def _as_text(value):
    """What a setting of the type text takes."""
    return value.text if isinstance(value, _Written) else value


def _as_value(value):
    """What all other settings take, and messages show."""
    if isinstance(value, list):
        return [_as_value(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_value(item) for key, item in value.items()}
    return None if value is EMPTY else value.value if isinstance(value, _Written) else value


# ----------------------------------------------------------------------------------------------------------------------
# Types


def _fields(cls) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


def _build(cls, tree: dict, prefix: str):
    """An instance of a (nested) config dataclass from a dict, every key and value checked."""
    fields, hints = _fields(cls), typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if key not in fields:
            raise _UnknownKey(dotted)
        kinds = alternatives(hints[key])
        optional = type(None) in kinds
        inner = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if inner is not None and value is EMPTY:
            if optional:
                raise ConfigError(dotted, f"is an empty section; write {_ways_to_write(inner, dotted, optional)}")
            value = {}
        value = None if value is EMPTY else value
        listed = next((item for item in items_of(kinds) if dataclasses.is_dataclass(item)), None)
        if listed is not None and isinstance(value, list):
            values[key] = [_build_section(listed, item, f"{dotted}[{index}]") for index, item in enumerate(value)]
        elif inner is None:
            values[key] = _convert(value, hints[key], fields[key].metadata, dotted)
        elif value is None and optional:
            values[key] = None
        else:
            values[key] = _build_section(inner, value, dotted, optional)
    return cls(**values)


def _build_section(cls, value, dotted: str, optional: bool = False):
    if not isinstance(value, dict):
        shown = value.text if isinstance(value, _Written) else repr(_as_value(value))
        raise ConfigError(dotted, f"{shown} is not a section; write {_ways_to_write(cls, dotted, optional)}")
    return _build(cls, value, f"{dotted}.")


def _ways_to_write(cls, dotted: str, optional: bool) -> str:
    """What may stand for a section: on the command line, and in YAML."""
    absent = (
        f"{dotted}=null to leave it out, {dotted}={{}} for its defaults (in YAML {dotted}: null, {dotted}: {{}}), or "
    )
    keys = ", ".join(_fields(cls))
    return f"{absent if optional else ''}its keys, as in {dotted}.{next(iter(_fields(cls)))}=VALUE: {keys}"


def items_of(kinds: tuple) -> tuple:
    """The types that the items of a setting may have, where it may be a list. kinds: those of the setting."""
    return tuple(item for kind in kinds if typing.get_origin(kind) is list for item in typing.get_args(kind))


def alternatives(hint) -> tuple:
    """The types that a setting may have."""
    if hint is typing.Never:
        return ()
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return typing.get_args(hint)
    return (hint,)


def _convert(value, hint, bounds, key: str):
    """Checks a value against its type hint, and numbers against their bounds.

    YAML reads 1e-5 (without a point) as text; it is taken as a number, and 1e3 also as a whole one. Text may look like
    a number, a bool or a date.
    """
    written, value = value, _as_value(value)
    for kind in alternatives(hint):
        if kind is type(None) and value is None:
            return None
        if typing.get_origin(kind) is Literal and _as_text(written) in typing.get_args(kind):
            return _as_text(written)
        if kind is str and isinstance(_as_text(written), str):
            return _as_text(written)
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return _within(value, bounds, key)
        if kind is int and isinstance(_as_text(written), str) and EXPONENT.fullmatch(_as_text(written)):
            number = float(_as_text(written))
            if number.is_integer() and abs(number) < 2**53:  # from there on not every whole number is a float
                return _within(int(number), bounds, key)
        if kind is float:
            number = _as_float(value)
            if number is not None:
                return _within(number, bounds, key)
        if typing.get_origin(kind) is list and isinstance(value, list):
            (inner,) = typing.get_args(kind)
            return [_convert(item, inner, bounds, f"{key}[{index}]") for index, item in enumerate(written)]
    allowed = " or ".join(describe_type(kind) for kind in alternatives(hint))
    if type(None) in alternatives(hint) and str(value).lower() == "none":
        allowed += f" (write {key}=null)"
    if items_of(alternatives(hint)) and isinstance(_as_text(written), str) and str not in alternatives(hint):
        allowed += f" (one alone is written [{_as_text(written)}])"
    choices = [str(choice) for choice in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []
    close = difflib.get_close_matches(str(value), choices, n=1)
    suggestion = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(key, f"{value!r} is not allowed; allowed: {allowed}{suggestion}")


def _as_float(value) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _within(number, bounds, key: str):
    for bound, broken, words in (
        (bounds["minimum"], lambda limit: number < limit, "at least"),
        (bounds["maximum"], lambda limit: number > limit, "at most"),
        (bounds["above"], lambda limit: number <= limit, "above"),
    ):
        if bound is not None and broken(bound):
            raise ConfigError(key, f"{number} is out of range; it must be {words} {bound}")
    return number


def describe_type(kind) -> str:
    """A type in words."""
    if kind is type(None):
        return "null"
    if typing.get_origin(kind) is Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return f"a list of {describe_type(typing.get_args(kind)[0])}"
    if dataclasses.is_dataclass(kind):
        return f"mappings with {', '.join(_fields(kind))}"
    return {str: "text", bool: "true | false", int: "a whole number", float: "a finite number"}[kind]
