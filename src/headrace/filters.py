"""`--where` expressions: a small part of Python's syntax, turned into an Arrow expression.

    stars >= 4 and date > '2015-01-01'
    city in ('Oakland', 'Antwerp') or text is not None
    not available

Comparisons of columns with literals, `in`, `is None`, `is not None`, `and`, `or`, `not`, parentheses.
"""

from __future__ import annotations

import ast
import operator
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
    reader = _Reader(text, schema)
    return Filter(text, tuple(dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))), reader.truth(tree))


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
        except ValueError:
            raise self.refuse(right) from None
        if value is None and isinstance(op, (ast.Is, ast.IsNot, ast.Eq, ast.NotEq)):
            return field.is_valid() if isinstance(op, (ast.IsNot, ast.NotEq)) else field.is_null()
        if isinstance(op, (ast.In, ast.NotIn)) and isinstance(value, (list, tuple, set)):
            found = field.isin(pa.array([self.literal(item, kind, left).as_py() for item in value], kind))
            return found if isinstance(op, ast.In) else ~found
        if type(op) not in _COMPARE:
            raise self.refuse(ast.Compare(left, [op], [right]))
        return _COMPARE[type(op)](field, pc.scalar(self.literal(value, kind, left)))

    def literal(self, value: Any, kind: pa.DataType, column: ast.expr) -> pa.Scalar:
        """The literal as a scalar of the column's type; a number against a whole-number column may have a fraction."""
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        try:
            if isinstance(value, float) and pa.types.is_integer(kind):
                return pa.scalar(value, pa.float64())
            if isinstance(value, str) != (pa.types.is_string(kind) or pa.types.is_large_string(kind)) and not pa.types.is_temporal(kind):
                raise ValueError("text and numbers do not compare")
            return pa.scalar(value).cast(kind)
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise SourceError(
                f"--where {self.text!r}: {value!r} does not fit column {ast.unparse(column)!r} of type {kind}: {error}"
            ) from None
