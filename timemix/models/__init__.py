"""The architectures; each is a mixer and a feed-forward half around the same embedding, blocks and head."""

from timemix.models.language_model import LanguageModel, State

__all__ = ["LanguageModel", "State"]
