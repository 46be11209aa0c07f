"""Extension of griffe, for the Python reference: a table of the fields of a dataclass, with the comments behind them."""

import ast
import re

import griffe


class FieldComments(griffe.Extension):
    def on_class_members(self, *, node, cls, **kwargs):
        if not isinstance(node, ast.AST) or "dataclass" not in cls.labels:
            return
        lines = cls.module.filepath.read_text().splitlines()
        fields = [member for member in cls.members.values() if member.is_attribute and "property" not in member.labels]
        rows = []
        for field in fields:
            text = field.docstring.value if field.docstring else " ".join(comments_of(field, lines))
            default = f" Default: `{field.value}`." if field.value is not None else ""
            text = ' '.join(text.split()).removesuffix('.')
            rows.append(f"    {field.name}: {text + '.' * bool(text)}{default}")
            field.docstring = None  # else it is listed a second time, below the table
        if rows:
            text = cls.docstring.value if cls.docstring else ""
            cls.docstring = griffe.Docstring("\n".join([text, "", "Attributes:", *rows]), parent=cls)


def comments_of(field: griffe.Attribute, lines: list[str]) -> list[str]:
    """The comment lines above a field and the comment behind it."""
    comments = re.findall(r" # (?!fmt:)(.+)$", lines[field.endlineno - 1])
    above = field.lineno - 2
    while lines[above].strip().startswith("# "):
        comments.insert(0, lines[above].strip().removeprefix("# "))
        above -= 1
    return comments
