"""In-place calls become plain ones: in our graph a value never changes once it is there."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx
from torch._ops import OpOverload

from dmqfx.errors import CaptureError
from dmqfx.graph import ops

__all__ = ["remove_inplace"]


def remove_inplace(graph: fx.Graph, path: Callable[[fx.Node], str]) -> None:
    """y = f_(x); g(x)  ->  y = f(x); g(y).   `path` names the module of a node, for the error.

    Raises: CaptureError where x shares its memory with another value that is read afterwards.
    """
    for node in list(graph.nodes):
        if not (isinstance(node.target, OpOverload) and node.target._schema.is_mutable):
            continue
        changed, *others = (
            a.name for a in node.target._schema.arguments if a.alias_info and a.alias_info.is_write
        )
        before = ops.args(node)[changed]
        if others or not isinstance(before, fx.Node) or _shared(before, node):
            raise CaptureError(
                "writes into memory that something else reads",
                address=path(node),
                operator=str(node.target),
                mend="let the module make a new tensor instead",
            )
        later = _readers_after(before, node)
        if ops.is_call(node, "detach_"):
            node.replace_all_uses_with(before)
            graph.erase_node(node)
            continue
        node.target = _plain(node.target, path(node))
        for reader in later:
            reader.replace_input_with(before, node)


def _plain(target: OpOverload, path: str) -> OpOverload:
    namespace, _, name = target._schema.name.partition("::")
    try:
        return ops.overload(f"{namespace}.{name.removesuffix('_')}.{target._overloadname}")
    except ValueError as error:
        raise CaptureError(
            "changes a tensor in place and has no form that does not",
            address=path,
            operator=str(target),
            mend="let the module make a new tensor instead",
        ) from error


def _shared(value: fx.Node, at: fx.Node) -> bool:
    """Whether a value that is about to change is a view, or has a view that is read later."""
    if value.op != "call_function" or _is_view(value):
        return True
    views = [reader for reader in value.users if reader < at and _is_view(reader)]
    while views:
        view = views.pop()
        if _readers_after(view, at):
            return True
        views += [reader for reader in view.users if reader < at and _is_view(reader)]
    return False


def _is_view(node: fx.Node) -> bool:
    schema = node.target._schema if isinstance(node.target, OpOverload) else None
    may_alias = schema is None or any(r.alias_info is not None for r in schema.returns)
    return not (schema and schema.is_mutable) and (may_alias or ops.is_call(node, "dropout"))


def _readers_after(value: fx.Node, node: fx.Node) -> list[fx.Node]:
    return [reader for reader in value.users if reader > node]
