"""`--where` expressions: a small part of Python's syntax, turned into an Arrow expression.

    stars >= 4 and date > '2015-01-01'
    city in ('Oakland', 'Antwerp') or text is not None
    not available

Comparisons of columns with literals, `in`, `is None`, `is not None`, `and`, `or`, `not`, parentheses.
"""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import SourceError, listing, nearest

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ZONE = re.compile(r"\d\d:\d\d.*([zZ]|[+-]\d\d(:?\d\d)?)$")
_ALLOWED = "allowed are columns compared with literals (== != < <= > >=), in (...), is None, is not None, and, or, not"


@dataclass(frozen=True, slots=True)
class Filter:
    """A checked `--where` expression: its text, the columns that it reads, and the Arrow expression."""

    text: str
    columns: tuple[str, ...]
    expression: pc.Expression


def parse(text: str, schema: pa.Schema) -> Filter:
    """The filter that `text` stands for, with literals cast to the types of the columns that they are compared with.

    Raises:
        SourceError: not an expression of the kind allowed, an unknown column, or a literal that does not fit its column.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise SourceError(f"--where {text!r} is not an expression: {error.msg}; {_ALLOWED}") from None
    expression = _Reader(text, schema).truth(tree)
    try:
        schema.empty_table().filter(expression)
    except pa.ArrowException as error:  # two columns that do not compare, say
        raise SourceError(f"--where {text!r} does not fit the input's columns: {error}") from None
    return Filter(text, tuple(dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))), expression)


@dataclass(frozen=True, slots=True)
class _Reader:
    text: str
    schema: pa.Schema

    def refuse(self, node: ast.AST) -> SourceError:
        return SourceError(f"--where {self.text!r}: cannot use {ast.unparse(node)!r}; {_ALLOWED}")

    def column(self, node: ast.expr) -> tuple[pc.Expression, pa.DataType]:
        if not isinstance(node, ast.Name):
            raise self.refuse(node)
        if node.id not in self.schema.names:
            raise SourceError(
                f"--where {self.text!r}: no column {node.id!r} in the input; it has {listing(self.schema.names)}" + nearest(node.id, self.schema.names)
            )
        return pc.field(node.id), self.schema.field(node.id).type

    def truth(self, node: ast.expr) -> pc.Expression:
        """A node that is true or false for each row."""
        match node:
            case ast.BoolOp(op=op, values=[first, *rest]):
                result = self.truth(first)
                for value in rest:
                    result = result & self.truth(value) if isinstance(op, ast.And) else result | self.truth(value)
                return result
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self.truth(operand)
            case ast.Name():
                field, kind = self.column(node)
                if not pa.types.is_boolean(kind):
                    raise SourceError(f"--where {self.text!r}: {node.id!r} is {kind}, not a truth value; compare it with something")
                return field
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self.compare(left, op, right)
            case ast.Compare(left=left, ops=[op, *ops], comparators=[right, *others]):  # 1 < x < 5
                return self.compare(left, op, right) & self.truth(ast.Compare(right, ops, others))
        raise self.refuse(node)

    def compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        if not isinstance(left, ast.Name) and isinstance(right, ast.Name):  # 4 <= stars
            mirrored = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
            return self.compare(right, mirrored.get(type(op), type(op))(), left)
        field, kind = self.column(left)
        if isinstance(right, ast.Name) and type(op) in _COMPARE:
            return _COMPARE[type(op)](field, self.column(right)[0])
        try:
            value = ast.literal_eval(right)
        except (ValueError, TypeError):
            raise self.refuse(right) from None
        if value is None and isinstance(op, (ast.Is, ast.IsNot, ast.Eq, ast.NotEq)):
            return field.is_valid() if isinstance(op, (ast.IsNot, ast.NotEq)) else field.is_null()
        if isinstance(op, (ast.In, ast.NotIn)) and isinstance(value, (list, tuple, set)):
            matches = [field == pc.scalar(self.literal(item, kind, left)) for item in value]  # a null is in no list, and not outside of one
            found = functools.reduce(operator.or_, matches) if matches else pc.scalar(False)
            return found if isinstance(op, ast.In) else ~found
        if type(op) not in _COMPARE:
            raise self.refuse(ast.Compare(left, [op], [right]))
        return _COMPARE[type(op)](field, pc.scalar(self.literal(value, kind, left)))

    def literal(self, value: Any, kind: pa.DataType, column: ast.expr) -> pa.Scalar:
        """The literal as a scalar of the column's type; a number against a whole-number column may have a fraction."""
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_temporal)
        try:
            if isinstance(value, float) and pa.types.is_integer(kind):
                return pa.scalar(value, pa.float64())
            if isinstance(value, str) != any(matches(kind) for matches in texts):
                raise ValueError("dates are written as text, '2015-01-01'" if pa.types.is_temporal(kind) else "text and numbers do not compare")
            if pa.types.is_timestamp(kind) and not _ZONE.search(value):  # without a zone, an instant is in UTC
                return pc.assume_timezone(pa.scalar(value).cast(pa.timestamp(kind.unit)), "UTC").cast(kind) if kind.tz else pa.scalar(value).cast(kind)
            return pa.scalar(value).cast(kind)
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise SourceError(f"--where {self.text!r}: {value!r} does not fit column {ast.unparse(column)!r} of type {kind}: {error}") from None
