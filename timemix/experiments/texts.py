"""The texts of a comparison: the tokens of each variant, with and without the part that tuning holds out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from timemix.data.config import DataConfig
from timemix.data.corpus import Corpus, is_corpus, open_corpus, open_prepared
from timemix.data.prepare import hold_out_end, prepare
from timemix.errors import InvalidValue
from timemix.experiments.variants import Variant

BEGINNING_TOKENS = 24


class Texts:
    """The prepared folders of a comparison. Variants with equal settings share a folder.

    Args:
        folder: Folder of the prepared folders. Existing prepared folders are opened.
        configs: Settings that determine the tokens of each variant, by its name.
        is_tuned: Whether to hold out the end of each training text in further folders, for tuning runs.

    Raises:
        InvalidValue: A text is empty or not in its encoding.
        FileError: A file is missing, damaged, or cannot be written.
    """

    def __init__(self, folder: Path, configs: Mapping[str, DataConfig], *, is_tuned: bool) -> None:
        self._folder, self._configs = folder, configs
        self._open = {
            config: self._opened(number, config, is_tuned)
            for number, config in enumerate(dict.fromkeys(configs.values()))
        }

    def _opened(self, number: int, config: DataConfig, is_tuned: bool) -> dict[bool, tuple[Path, Corpus]]:
        """Return prepared folders with tokens: under False for runs with seeds, under True for tuning runs, if any."""
        source = Path(config.source)
        if is_corpus(source):
            whole, corpus = source.resolve(), open_prepared(config)
        else:
            whole = (self._folder / str(number)).resolve()
            corpus = open_corpus(whole) if is_corpus(whole) else prepare(whole, config, progress=True)
        found = {False: (whole, corpus)}
        if is_tuned:
            tuning = (self._folder / f"{number}-tuning").resolve()
            if not is_corpus(tuning):
                hold_out_end(corpus, tuning, valid_tokens=config.valid_tokens or max(2, len(corpus.valid)))
            found[True] = tuning, open_corpus(tuning)
        return found

    def of(self, variant: Variant, tuning: bool = False) -> tuple[Path, Corpus]:
        """Return the prepared folder of a variant and its tokens, for tuning runs or for runs with seeds."""
        return self._open[self._configs[variant.name]][tuning]


def common_beginning(corpora: Sequence[Corpus]) -> str:
    """Return the beginning of the first held-out text, up to the first character that a vocabulary lacks.

    Raises:
        InvalidValue: A vocabulary lacks the first character.
    """
    first = corpora[0]
    text = first.tokenizer.decode(first.valid[:BEGINNING_TOKENS])
    for end in range(len(text), 0, -1):
        if not any(c.tokenizer.encode_lenient(text[:end])[1] for c in corpora) and "\ufffd" not in text[:end]:
            return text[:end]
    raise InvalidValue(
        "prompts is missing, and the held-out text begins with a character that a vocabulary lacks; give prompts"
    )
