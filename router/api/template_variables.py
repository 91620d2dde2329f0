"""Chat templates are told more than messages and tools: variables, an effort of reasoning, documents."""

from __future__ import annotations

from collections.abc import Mapping

from ...common.errors import RequestError
from ..bodies.schemas import ChatBody
from ..bodies.text_bodies import TokenizeBody
from ..bodies.values import TEMPLATE_KWARGS
from ..catalogue.version import Version
from ..state.errors import clip

_OWN_FIELDS = frozenset({"messages", "tools", "add_generation_prompt"})  # of the body: set there


def template_variables(version: Version, body: ChatBody | TokenizeBody, ignored: list[str] | None) -> dict[str, object]:
    """Return what the template is given. Raises RequestError for what it does not look at, unless a list takes it."""
    found = dict(_known(version, body.chat_template_kwargs or {}, ignored))
    if (effort := asked_effort(body)) is not None:
        if "reasoning_effort" in version.dialect.switches:
            found.setdefault("reasoning_effort", version.dialect.effort(effort))
        for switch in version.dialect.switches & {"enable_thinking", "thinking"}:  # they know only whether
            found.setdefault(switch, effort != "none")
    if isinstance(body, ChatBody) and body.documents:
        if "documents" in version.dialect.variables:
            found["documents"] = body.documents
        elif ignored is None:
            message = f"'documents' is not supported: the chat template of '{version.model.name}' has no place for them"
            raise RequestError(message, param="documents", code="unsupported_parameter")
        else:
            ignored.append("documents")
    return found


def _known(version: Version, given: Mapping[str, object], ignored: list[str] | None) -> Mapping[str, object]:
    """Return the variables that the template has, or some do: clients send those to every model."""
    known = TEMPLATE_KWARGS | version.dialect.variables - _OWN_FIELDS
    unknown = sorted(given.keys() - known)
    if unknown and ignored is None:
        own = sorted(version.dialect.variables - _OWN_FIELDS)
        has = f"which has {clip(', '.join(own), 200)}" if own else "which has none"
        message = f"chat_template_kwargs: {clip(unknown[0])} is no variable of the model's chat template, {has}"
        raise RequestError(message, param="chat_template_kwargs", code="unknown_parameter")
    if ignored is not None:
        ignored += [f"chat_template_kwargs.{name}" for name in unknown]
    return {name: value for name, value in given.items() if name in known}


def asked_effort(body: ChatBody | TokenizeBody) -> str | None:
    """Return the effort of reasoning that a chat asks for; None: it does not say."""
    return body.reasoning_effort if isinstance(body, ChatBody) else None


def without_effect(version: Version, body: ChatBody | TokenizeBody) -> list[str]:
    """Return the fields that ask for what this model's template knows no words for."""
    if not isinstance(body, ChatBody):
        return []
    names = ["reasoning_effort"] if body.reasoning_effort is not None and not version.dialect.has_switch else []
    return [*names, "verbosity"] if body.verbosity in ("low", "high") else names  # medium is what happens
