"""YAML that can do no harm: plain types alone, nothing that holds itself, grows by its aliases or stands twice."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

DEEPEST = 40  # levels of lists and mappings
MOST = 100_000  # values, each alias counted as all that it stands for
MERGE = "tag:yaml.org,2002:merge"


class Loader(yaml.SafeLoader):
    """A loader that refuses, as an error of YAML with its line, what PyYAML's own loads in hours or not at all."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}  # of the nodes that are whole

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node with all below it; of an alias the node that it stands for."""
        place, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > DEEPEST:
            raise ComposerError(None, None, "nested too deeply", place)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if not is_alias:
            self._sizes[node] = self._size(node)
        elif node not in self._sizes:
            raise ComposerError(None, None, "it holds itself", place)
        return node

    def _size(self, node: Any) -> int:
        """How many values a node holds."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        if isinstance(node, yaml.MappingNode):
            _refuse_repeats(node)
            inside = [part for pair in node.value for part in pair]
        else:
            inside = node.value
        size = 1 + sum(self._sizes[part] for part in inside)
        if size > MOST:
            raise ComposerError(None, None, "its aliases stand for too much", node.start_mark)
        return size

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node; PyYAML lets what int(), datetime and others raise at odd values through as it is."""
        try:
            return super().construct_object(node, deep=deep)
        except yaml.YAMLError:
            raise
        except Exception as error:
            raise ConstructorError(None, None, str(error), node.start_mark) from error


def _refuse_repeats(node: yaml.MappingNode) -> None:
    """Raise an error of YAML where a key stands twice: which of the two is meant, nobody can tell."""
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
            if (key.tag, key.value) in seen:
                raise ComposerError(None, None, f"the key {key.value[:80]} stands twice", key.start_mark)
            seen.add((key.tag, key.value))
