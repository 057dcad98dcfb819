# SPDX-License-Identifier: Apache-2.0
"""
Evaluate the part of PromQL that our rules and dashboards use, over samples in memory.

An instrument of the tests, read by the official grammar. What it does not know it refuses by name. Where
promtool is found, a test holds its answers against promtool's.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import promql_parser as pp

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]

#: Seconds that a sample stands for what comes after it.
LOOKBACK: Final = 300.0
#: Of a time between two samples, how much of the next may be missing before a series counts as begun or ended there.
_EDGE: Final = 1.1

_MATCH: Final[Mapping[str, Callable[[str, str], bool]]] = {
    "MatchOp.Equal": operator.eq,
    "MatchOp.NotEqual": operator.ne,
    "MatchOp.Re": lambda value, pattern: re.fullmatch(pattern, value) is not None,
    "MatchOp.NotRe": lambda value, pattern: re.fullmatch(pattern, value) is None,
}
_ARITHMETIC: Final[Mapping[str, Callable[[float, float], float]]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": lambda a, b: a / b if b else (math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a)),
}  # fmt: skip
_COMPARE: Final[Mapping[str, Callable[[float, float], bool]]] = {
    ">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_AGGREGATE: Final[Mapping[str, Callable[[Sequence[float]], float]]] = {
    "sum": sum, "max": max, "min": min, "count": len, "avg": lambda values: sum(values) / len(values),
}  # fmt: skip


@dataclass(slots=True)
class Samples:
    """Series by name and labels; each a row of (seconds, value), in time's order. None: it ended there."""

    series: dict[str, dict[Labels, list[tuple[float, float | None]]]] = field(default_factory=dict)

    def add(self, at: float, name: str, labels: Mapping[str, str], value: float | None) -> None:
        """Add the next sample of a series."""
        self.series.setdefault(name, {}).setdefault(frozenset(labels.items()), []).append((at, value))

    def select(self, selector: Any, start: float, end: float) -> Iterator[tuple[Labels, list[tuple[float, float | None]]]]:
        """Rows of each series that *selector* matches, later than *start* and not later than *end*."""
        matchers = [(_MATCH[str(m.op)], m.name, m.value) for m in selector.matchers.matchers]
        for labels, row in self.series.get(selector.name, {}).items():
            known = dict(labels)
            if all(matches(known.get(name, ""), value) for matches, name, value in matchers):
                first, last = (bisect_right(row, moment, key=lambda sample: sample[0]) for moment in (start, end))
                yield labels, row[first:last]


def evaluate(expr: str, samples: Samples, at: float) -> Vector:
    """The value of *expr* at a moment, by labels; a scalar is a value without labels."""
    found = _value(pp.parse(expr), samples, at)
    return {frozenset(): found} if isinstance(found, float) else found


def names(expr: str) -> set[str]:
    """Every series that *expr* reads."""
    return set(_names(pp.parse(expr)))


def _names(node: Any) -> Iterator[str]:
    match node:
        case pp.VectorSelector():
            yield str(node.name)
        case pp.MatrixSelector():
            yield str(node.vector_selector.name)
        case pp.Call():
            for argument in node.args:
                yield from _names(argument)
        case pp.BinaryExpr():
            yield from (*_names(node.lhs), *_names(node.rhs))
        case pp.AggregateExpr() | pp.ParenExpr() | pp.UnaryExpr():
            yield from _names(node.expr)
        case pp.NumberLiteral() | pp.StringLiteral():
            pass
        case _:
            raise NotImplementedError(type(node).__name__)


def _value(node: Any, samples: Samples, at: float) -> Vector | float:
    match node:
        case pp.NumberLiteral():
            return float(node.val)
        case pp.ParenExpr():
            return _value(node.expr, samples, at)
        case pp.VectorSelector():
            return {
                labels | {("__name__", str(node.name))}: row[-1][1]
                for labels, row in samples.select(node, at - LOOKBACK, at) if row and row[-1][1] is not None
            }  # fmt: skip
        case pp.Call():
            return _call(node, samples, at)
        case pp.AggregateExpr():
            return _aggregate(node, samples, at)
        case pp.BinaryExpr():
            return _binary(node, _value(node.lhs, samples, at), _value(node.rhs, samples, at))
    raise NotImplementedError(type(node).__name__)


def _call(node: Any, samples: Samples, at: float) -> Vector:
    name = node.func.name
    if name in ("rate", "increase"):
        [matrix] = node.args
        seconds = matrix.range.total_seconds()
        found = {
            labels: _grown(row, at - seconds, at)
            for labels, row in samples.select(matrix.vector_selector, at - seconds, at)
        }
        return {labels: grown / (seconds if name == "rate" else 1) for labels, grown in found.items() if grown is not None}
    arguments = [_value(argument, samples, at) for argument in node.args]
    match name, arguments:
        case "abs", [dict() as vector]:
            return {_nameless(labels): abs(value) for labels, value in vector.items()}
        case "vector", [float() as number]:
            return {frozenset(): number}
        case "histogram_quantile", [float() as quantile, dict() as vector]:
            return _quantiles(quantile, vector)
    raise NotImplementedError(name)


def _grown(row: Sequence[tuple[float, float | None]], start: float, end: float) -> float | None:
    """By how much a counter grew between two moments, its resets added and its edges extended as Prometheus does."""
    points = [(moment, value) for moment, value in row if value is not None]
    if len(points) < 2:
        return None
    grown = points[-1][1] - points[0][1]
    grown += sum(before for (_, before), (_, after) in itertools.pairwise(points) if after < before)
    sampled = points[-1][0] - points[0][0]
    between = sampled / (len(points) - 1)
    before, after = points[0][0] - start, end - points[-1][0]
    if grown > 0 and points[0][1] >= 0:
        # It was not below zero before.
        before = min(before, sampled * points[0][1] / grown)
    covered = sampled
    covered += before if before < between * _EDGE else between / 2
    covered += after if after < between * _EDGE else between / 2
    return grown * (covered / sampled)


def _aggregate(node: Any, samples: Samples, at: float) -> Vector:
    vector = _value(node.expr, samples, at)
    assert isinstance(vector, dict)
    kept = set(node.modifier.labels) if node.modifier is not None else set()
    if node.modifier is not None and str(node.modifier.type) != "AggModifierType.By":
        raise NotImplementedError("without")
    groups: dict[Labels, list[float]] = {}
    for labels, value in vector.items():
        groups.setdefault(frozenset(pair for pair in labels if pair[0] in kept), []).append(value)
    return {labels: float(_AGGREGATE[str(node.op)](values)) for labels, values in groups.items()}


def _binary(node: Any, left: Vector | float, right: Vector | float) -> Vector | float:
    op = str(node.op)
    modifier = node.modifier
    if modifier is not None and (modifier.return_bool or modifier.matching is not None):
        raise NotImplementedError(f"{op} with a modifier")
    match left, right:
        case float(), float():
            return _ARITHMETIC[op](left, right)
        case dict(), float():
            return _each(op, ((labels, value, right) for labels, value in left.items()))
        case float(), dict():
            return _each(op, ((labels, left, value) for labels, value in right.items()), kept=2)
    assert isinstance(left, dict)
    assert isinstance(right, dict)
    others = {_nameless(labels): value for labels, value in right.items()}
    match op:
        case "and":
            return {labels: value for labels, value in left.items() if _nameless(labels) in others}
        case "unless":
            return {labels: value for labels, value in left.items() if _nameless(labels) not in others}
        case "or":
            mine = {_nameless(labels) for labels in left}
            return left | {labels: value for labels, value in right.items() if _nameless(labels) not in mine}
    pairs = ((labels, value, others[_nameless(labels)]) for labels, value in left.items() if _nameless(labels) in others)
    return _each(op, pairs)


def _each(op: str, pairs: Iterable[tuple[Labels, float, float]], *, kept: int = 1) -> Vector:
    if op in _COMPARE:
        return {pair[0]: pair[2] if kept == 2 else pair[1] for pair in pairs if _COMPARE[op](pair[1], pair[2])}
    return {_nameless(labels): _ARITHMETIC[op](left, right) for labels, left, right in pairs}


def _quantiles(quantile: float, vector: Vector) -> Vector:
    groups: dict[Labels, list[tuple[float, float]]] = {}
    for labels, count in vector.items():
        rest = frozenset(pair for pair in _nameless(labels) if pair[0] != "le")
        groups.setdefault(rest, []).append((float(dict(labels)["le"]), count))
    return {labels: _quantile(quantile, sorted(buckets)) for labels, buckets in groups.items()}


def _quantile(quantile: float, buckets: Sequence[tuple[float, float]]) -> float:
    total = buckets[-1][1]
    if total == 0 or math.isnan(total):
        return math.nan
    rank = quantile * total
    index = next(i for i, (_, count) in enumerate(buckets) if count >= rank)
    bound, count = buckets[index]
    if math.isinf(bound):
        return buckets[-2][0]
    low, below = buckets[index - 1] if index else (0.0, 0.0)
    return low + (bound - low) * (rank - below) / (count - below)


def _nameless(labels: Labels) -> Labels:
    return frozenset(pair for pair in labels if pair[0] != "__name__")
