"""A value of a YAML file, made from its node: of the plain kinds alone."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from ..common.errors import ConfigError

_TAGS = "tag:yaml.org,2002:"
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


class _Constructor(yaml.SafeLoader):
    """PyYAML's constructors do not look at a text before they take it apart: what fails then says nothing of it."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Leave words and numbers as they are written, with a tag too: `!!bool yes` would be 1 where numbers are."""
        try:
            value = super().construct_object(node, deep)
        except (TypeError, AttributeError, LookupError):
            tag = node.tag.replace(_TAGS, "!!")
            raise ConstructorError(None, None, f"the tag {tag} does not permit this value", node.start_mark) from None
        return node.value if isinstance(value, bool | int | float) else value

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Join the two escapes by which JSON, which is YAML too, writes one character: `"\\ud83d\\ude00"`."""
        value = super().construct_scalar(node)
        return _PAIR.sub(_joined, value) if isinstance(value, str) else value


def _joined(pair: re.Match[str]) -> str:
    return pair[0].encode("utf-16", "surrogatepass").decode("utf-16")


def construct(node: yaml.Node, origin: str) -> object:
    """Return what a node says. Raises ConfigError for a tag that builds other objects, or does not permit its value.

    `origin` is told with it: where the value stands.
    """
    loader = _Constructor("")
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin}: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: lists and mappings lie too deep in one another") from None
    finally:
        loader.dispose()
