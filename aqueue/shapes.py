"""What decoded values look like, said so that a type checker understands it."""

from typing import Any, TypeGuard


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """A JSON object, or its like from another format."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """A JSON array, or its like from another format."""
    return isinstance(value, list | tuple)
