"""Renders a model's chat template: somebody else's program, so in jinja2's sandbox, with bounds on steps and on every size it can reach.

The sandbox keeps a template from Python's internals. What it does not bound, this does: loop rounds and calls are counted, sums, products
and concatenations are measured before they are made, and the string methods and filters that pad to any width are gone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import reduce
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ..errors import ModelError, RequestError

MAX_SOURCE = 1 << 20    # characters; the longest known templates have 30 thousand
MAX_SIZE = 1 << 22      # characters of any text, items of any list, and of the result
MAX_STEPS = 100_000     # loop rounds and calls of one rendering
_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "translate"})
_PADDING_FILTERS = ("center", "indent", "format", "wordwrap", "xmlattr", "pprint")
_TICK = "__step"
# What a template, or our sandbox, raises out of a template that goes wrong.
_FAILURES = (jinja2.TemplateError, RecursionError, MemoryError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError)


class ChatTemplate:
    """One template. Raises ModelError where `source` is no template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_SOURCE:
            raise ModelError(f"the chat template has {len(source):,} characters, more than {MAX_SOURCE:,}")
        self._special_tokens = dict(special_tokens)
        environment = _Environment()
        try:
            self._code = environment.compile(_Bounded().visit(environment.parse(source)))
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(f"the chat template can't be read: {error}", hint="see chat_template.jinja beside the model") from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt's text. RequestError where the template refuses the messages, fails, or goes over a bound."""
        environment = _Environment()
        template = jinja2.Template.from_code(environment, self._code, environment.globals)
        variables = {**self._special_tokens, "messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        parts, size = [], 0
        try:
            for part in template.generate(**variables):
                size += len(part)
                if size > MAX_SIZE:
                    raise SecurityError(f"it writes more than {MAX_SIZE:,} characters")
                parts.append(part)
        except _FAILURES as error:
            raise RequestError(f"the chat template failed: {error}", hint="check roles and contents of the messages") from error
        return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """One rendering's sandbox: it counts."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self._steps = 0
        for name in _PADDING_FILTERS:
            self.filters.pop(name)
        self.filters["tojson"] = _tojson
        self.filters["replace"] = lambda text, old, new, count=-1: self._replace(str(text), str(old), str(new), count)
        self.filters["join"] = self._join
        self.globals = {
            "range": self._range, "namespace": self.globals["namespace"], "dict": dict, _TICK: self._tick,
            "raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form),
        }

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self._tick()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return self._replace(owner, *args, **kwargs)
        if isinstance(owner, str) and name == "join":
            return self._join(args[0], owner)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._tick()
        if operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("% of a text is not available to a chat template")
        if operator == "**":
            raise SecurityError("** is not available to a chat template")
        if operator == "*":
            _bound(_size(left) * max(_times(right), 1))
            _bound(_size(right) * max(_times(left), 1))
            _bound(_bits(left) + _bits(right))
        if operator == "+":
            _bound(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str | bytes) and attr in _PADDING_METHODS)

    def wrap_str_format(self, value: Any) -> Any:
        # Looked up before is_safe_attribute is asked, and it would pad to any width.
        if super().wrap_str_format(value) is not None:
            raise SecurityError("str.format is not available to a chat template")

    def _tick(self) -> str:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps")
        return ""

    def _range(self, *args: int) -> range:
        numbers = range(*args)
        if len(numbers) > MAX_STEPS:
            raise SecurityError(f"a range has more than {MAX_STEPS:,} numbers")
        self._steps += len(numbers)     # a filter may run over it without our seeing each round
        return numbers

    def _replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        found = text.count(old)
        _bound(len(text) + (found if count < 0 else min(found, count)) * len(new))
        return text.replace(old, new, count)

    def _join(self, value: Any, d: str = "", attribute: str | None = None) -> str:
        items = [str(self.getattr(item, attribute) if attribute else item) for item in value]
        _bound(sum(map(len, items)) + len(items) * len(d))
        return str(d).join(items)


class _Bounded(NodeTransformer):
    """Counts every round of a loop and every call of a macro; spells `a ~ b` as a sum, which is measured."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick())
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick())
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        texts: list[nodes.Expr] = [nodes.Filter(item, "string", [], [], None, None, lineno=node.lineno) for item in node.nodes]
        return reduce(lambda left, right: nodes.Add(left, right, lineno=node.lineno), texts)


def _tick() -> nodes.Node:
    return nodes.ExprStmt(nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)).set_lineno(1)


def _bound(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"it makes a value of more than {MAX_SIZE:,} items")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _times(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, separators: Any = None, sort_keys: bool = False) -> str:
    """As the field's templates expect it: no HTML escapes."""
    indent = None if indent is None else min(indent, 8)
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> str:
    raise jinja2.TemplateError(message)
