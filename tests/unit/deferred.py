"""Functions whose annotations are texts, and of which some names are seen by type checkers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    import elsewhere.models  # type: ignore[import-not-found]
    from somewhere import Session  # type: ignore[import-not-found]


@dataclass
class Point:
    """An argument."""

    x: int
    y: int


def resolved(point: Point, id: UUID) -> Point:
    """Every name can be found at run time."""
    return point


def unresolved(session: Session, point: Point, count: int) -> Point:
    """One name of several can't be found."""
    return point


def unresolved_in_a_module(model: elsewhere.models.Model, count: int) -> int:
    """The module itself can't be found."""
    return count


def unresolved_result(point: Point) -> Session:
    """The result's type can't be found."""
    return point


def no_such_attribute(value: UUID.NoSuchThing, count: int) -> int:  # type: ignore[name-defined]
    """The name is there, what it should have is not."""
    return count


def union_with_a_text(value: int | "UUID", count: int) -> int:  # noqa: UP037
    """An expression that fails when it is evaluated."""
    return count
