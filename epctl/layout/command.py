"""The body of `epctl inspect`: resolve, detect, show."""

from __future__ import annotations

from epctl.hub import resolve
from epctl.layout.detect import detect
from epctl.layout.document import layout_document, tensor_rows
from epctl.output import out


def inspect(
    model: str, *, tensors: bool = False, pattern: str | None = None, tree: bool = False
) -> None:
    """Shows the layout of `model`: a card, or its tensor table or module tree; JSON in json mode.

    Raises InputError, LayoutError or HubError.
    """
    source = resolve(model)
    for note in source.notes:
        out.note(f"note: {note}")
    layout = detect(source)
    if tree and (tensors or pattern):
        out.warning("`--tree` is ignored beside `--tensors` or `--filter`")
    document = layout_document(layout)
    if tensors or pattern:
        rows = tensor_rows(source.tensors, pattern)
        document["tensors"] = rows
        out.document(document)
        _show_tensors(rows)
    elif tree:
        from epctl.layout.tree import build_tree, fold_tree, tree_lines

        document["tree"] = fold_tree(build_tree(source.tensors))
        out.document(document)
        out.text("\n".join([layout.id, *tree_lines(source.tensors)]))
    else:
        from epctl.launch.memory_table import assumptions, memory_rows
        from epctl.layout.card import layout_card

        document["memory"] = rows = memory_rows(layout, source.config)
        out.document(document)
        out.data(layout_card(layout, rows, assumptions()))


def _show_tensors(rows: list[dict[str, object]]) -> None:
    width = max((len(str(row["name"])) for row in rows), default=0)
    lines = [
        f"{row['name']!s:<{width}}  {row['dtype']!s:<8} {row['shape']!s:<24} {row['file']}".rstrip()
        for row in rows
    ]
    out.text("\n".join([*lines, f"{len(rows)} tensors"]))
