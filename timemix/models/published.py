"""Conversion of parameter names between timemix and the published code of an architecture."""

import re

from timemix.errors import InvalidValue


class PublishedNames:
    """Pairs of the name of a parameter in timemix and its name in the published code.

    Args:
        model: Name of the published model, for error messages.
        layers: Text before the number of a layer in the published code, such as "model.layers".
        outside: Published name of each parameter outside the blocks, by its name in timemix.
        in_block: Published name of each parameter of a block, by its name in timemix. Both names follow the number of
            the layer.
    """

    def __init__(self, model: str, layers: str, outside: dict[str, str], in_block: dict[str, str]) -> None:
        self._model, self._layers = model, layers
        self._outside, self._in_block = outside, in_block
        self._outside_back, self._in_block_back = ({b: a for a, b in names.items()} for names in (outside, in_block))

    def published(self, name: str) -> str:
        """Convert a name from timemix to the published code.

        Args:
            name: Name in timemix.

        Returns:
            Name in the published code.
        """
        if name in self._outside:
            return self._outside[name]
        _, layer, rest = name.split(".", 2)
        return f"{self._layers}.{layer}.{self._in_block[rest]}"

    def ours(self, name: str) -> str:
        """Convert a name from the published code to timemix.

        Args:
            name: Name in the published code.

        Returns:
            Name in timemix.

        Raises:
            InvalidValue: The name is unknown.
        """
        if name in self._outside_back:
            return self._outside_back[name]
        match = re.fullmatch(rf"{re.escape(self._layers)}\.(\d+)\.(.+)", name)
        known = self._in_block_back.get(match[2]) if match else None
        if match is None or known is None:
            raise InvalidValue(f"{name!r} is not a parameter of {self._model}; remove it")
        return f"blocks.{match[1]}.{known}"
