"""The nesting of a program's inputs and outputs, checked before torch rebuilds it.

An exported program stores it as JSON text. Rebuilding one imports a module of the file's choice for a
`defaultdict` and for an enum among a container's keys (torch/utils/_pytree.py, `_defaultdict_deserialize` and
`enum_object_hook`), and keyword names become Python source when the program is turned into a module.
"""

from __future__ import annotations

import json
import re
from typing import Any

from graphopt.errors import cut, printable
from graphopt.loading.refusal import DamagedError, HostileError

_TYPE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_IMPORTING = ("collections.defaultdict",)


def check_treespec(text: object) -> str:
    """Return `text` unchanged where it is a harmless serialized TreeSpec; raises `HostileError` or `DamagedError`."""
    if not isinstance(text, str):
        raise DamagedError("the nesting of its inputs is not text")
    try:
        protocol, tree = json.loads(text)
    except (ValueError, TypeError, RecursionError) as err:
        raise DamagedError("the nesting of its inputs or outputs is not valid JSON") from err
    if protocol != 1:
        raise DamagedError(f"the nesting of its inputs is of protocol {protocol!r}, not 1")
    _check_node(tree, 0)
    _check_keyword_names(tree)
    return text


def _check_node(node: Any, depth: int) -> None:
    if depth > 64 or not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"}:
        raise DamagedError("the nesting of its inputs or outputs is malformed")
    kind, context, children = node["type"], node["context"], node["children_spec"]
    if not isinstance(children, list):
        raise DamagedError("the nesting of its inputs or outputs is malformed")
    if kind is None:
        if context is not None or children:
            raise DamagedError("the nesting of its inputs or outputs is malformed")
        return
    if not isinstance(kind, str) or not _TYPE.fullmatch(kind) or kind in _IMPORTING:
        raise HostileError(
            f"its inputs or outputs are held in a `{cut(printable(str(kind)), 80)}`, which may import code"
        )
    _check_plain(_context(context))
    for child in children:
        _check_node(child, depth + 1)


def _context(context: Any) -> Any:
    """Return what torch will make of a node's context: JSON in text, or (a namedtuple) the name of a type."""
    if not isinstance(context, str):
        return context
    try:
        return json.loads(context)
    except (ValueError, RecursionError):
        return context


def _check_plain(value: Any) -> None:
    if isinstance(value, dict):
        if "__enum__" in value or "fqn" in value:
            raise HostileError("the keys of its inputs or outputs name a Python class to import")
        for key, item in value.items():
            _check_plain(key)
            _check_plain(item)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item)
    elif isinstance(value, str) and not value.isprintable():
        raise HostileError(f"a key of its inputs or outputs, {cut(value, 80)!r}, is no text to print")


def _check_keyword_names(tree: dict[str, Any]) -> None:
    """Keyword arguments of the program become names in generated source: they must be identifiers."""
    children = tree["children_spec"]
    if len(children) != 2 or children[1]["type"] is None:
        return
    keys = _context(children[1]["context"])
    for key in keys if isinstance(keys, list) else []:
        if isinstance(key, str) and not key.isidentifier() and children[0]["type"] == "builtins.tuple":
            raise HostileError(f"a keyword argument of it is called {cut(key, 80)!r}, which is not a name")
