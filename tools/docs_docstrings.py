"""Extension of the docstring reader: signatures of NamedTuples, and `<` in docstrings."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Give each NamedTuple the signature of its fields, and set `<name>` in a docstring as code."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add `__init__`: with it, the types of `Args:` are known and their names are checked."""
        if "NamedTuple" not in {str(base).rpartition(".")[2] for base in cls.bases}:
            return
        fields = [
            griffe.Parameter(
                name,
                annotation=member.annotation,
                kind=griffe.ParameterKind.positional_or_keyword,
                default=member.value,
            )
            for name, member in cls.members.items()
            if isinstance(member, griffe.Attribute)
        ]
        own = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
        cls.set_member(
            "__init__", griffe.Function("__init__", parameters=griffe.Parameters(own, *fields), returns="None")
        )

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Mark `<name>` as code: as HTML it would be an unknown, invisible element."""
        if obj.docstring:
            parts = re.split(r"(`[^`]*`)", obj.docstring.value)
            parts[::2] = [re.sub(r"<[a-z]+>", r"`\g<0>`", part) for part in parts[::2]]
            obj.docstring.value = "".join(parts)
