"""A YAML loader for untrusted files: only plain types, no duplicate keys, no bombs of nesting or aliases."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

DEEPEST = 40  # levels of lists and mappings
MOST = 100_000  # values, each alias counted with everything it refers to
MERGE = "tag:yaml.org,2002:merge"


class Loader(yaml.SafeLoader):
    """A loader that reports as an error, with its line, what PyYAML's own would need hours for or crash on."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}  # of the nodes that are complete

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node with everything below it; for an alias, the node that it refers to."""
        place = self.peek_event().start_mark
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > DEEPEST:
            raise ComposerError(None, None, "nested too deeply", place)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if not is_alias:
            self._sizes[node] = self._size(node)
        elif node not in self._sizes:
            raise ComposerError(None, None, "it contains itself", place)
        return node

    def _size(self, node: Any) -> int:
        """How many values a node contains."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        if isinstance(node, yaml.MappingNode):
            _refuse_repeats(node)
            inside = [part for pair in node.value for part in pair]
        else:
            inside = node.value
        size = 1 + sum(self._sizes[part] for part in inside)
        if size > MOST:
            raise ComposerError(None, None, "its aliases expand to too many values", node.start_mark)
        return size

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node. What int(), datetime and others raise for odd values becomes an error of YAML."""
        try:
            return super().construct_object(node, deep=deep)
        except yaml.YAMLError:
            raise
        except Exception as error:
            raise ConstructorError(None, None, str(error), node.start_mark) from error


class Dumper(yaml.SafeDumper):
    """A dumper whose text this loader reads as text."""


# YAML 1.1, as in PyYAML, reads 1e-5 as text; YAML 1.2, JSON and everyone who types it mean a number.
EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def _refuse_repeats(node: yaml.MappingNode) -> None:
    """Raises ComposerError for a duplicate key, since only the user knows which of the two is meant."""
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
            if (key.tag, key.value) in seen:
                raise ComposerError(None, None, f"duplicate key: {key.value[:80]}", key.start_mark)
            seen.add((key.tag, key.value))
