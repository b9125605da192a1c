"""Measure time and memory of preparing a large text; then kill another preparation half way, and resume it.

With --rounds, the script measures the formats in turn, and kills nothing.

    python benchmarks/large_corpus.py FOLDER [--gigabytes 10] [--kinds character word subword world] [--keep]
    python benchmarks/large_corpus.py FOLDER --gigabytes 2 --formats txt jsonl parquet --rounds 3

The script writes a synthetic text (random words with some non-ASCII letters, in lines and sentences) and the prepared
folders to FOLDER, and deletes them at the end. The files of records have the lines of this text in documents of about
2,000 characters. All MB/s count the bytes of the text alone. The memory of a process is the value VmHWM of Linux. The
script sums the current memory of all processes ten times per second. Pages that processes share count once for each
process.
"""

import argparse
import contextlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

SETTINGS = {
    "character": [],
    "word": ["--data.tokenizer", "word", "--data.unknown", "unk"],
    "subword": ["--data.tokenizer", "subword", "--data.vocab-size", "4096"],
    "world": ["--data.tokenizer", "world"],
}


def words(generator: np.random.Generator, count: int = 30_000) -> np.ndarray:
    """Return distinct words in UTF-8, each followed by a space or punctuation."""
    letters = np.array(list("etaoinshrdlcumwfgypbvkjxqzéüñßжя鱼"))
    odds = 1 / (np.arange(len(letters)) + 2.0)
    made = {"".join(generator.choice(letters, n, p=odds / odds.sum())) for n in generator.integers(1, 11, count)}
    ends = [" "] * 14 + [", ", ". ", ".\n", "\n"]
    followed = [
        (word + ends[i]).encode() for word, i in zip(sorted(made), generator.integers(0, 18, len(made)), strict=True)
    ]
    return np.array(followed, object)


def write_text(path: Path, size: int) -> None:
    """Write at least `size` bytes of text in pieces of a few megabytes. Word frequencies follow Zipf's law."""
    generator = np.random.default_rng(0)
    vocabulary = words(generator)
    generator.shuffle(vocabulary)
    odds = np.cumsum(1 / (np.arange(len(vocabulary)) + 2.0))
    with path.open("wb") as file:
        while file.tell() < size:
            places = np.searchsorted(odds, generator.random(1_000_000) * odds[-1])
            file.write(b"".join(vocabulary[places]))


def write_records(text: Path, path: Path) -> None:
    """Save a text as JSON lines or Parquet, in records of whole lines with about 2,000 characters."""
    with text.open(encoding="utf-8", newline="") as lines:
        records = ("".join(group) for group in iter(lambda: lines.readlines(2000), []))
        if path.suffix == ".jsonl":
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": record}, ensure_ascii=False) + "\n" for record in records)
            return
        with parquet.ParquetWriter(path, pyarrow.schema({"text": pyarrow.string()})) as writer:
            while group := list(itertools.islice(records, 10_000)):
                writer.write_table(pyarrow.table({"text": group}))


class Memory:
    """Watch the resident memory of a process and its descendants until the process ends."""

    def __init__(self, number: int) -> None:
        self.main = self.together = 0
        self.others: dict[int, int] = {}
        self._number = number
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _watch(self) -> None:
        while (now := status(self._number)) is not None:
            self.main = max(self.main, now["VmHWM"])
            together = now["VmRSS"]
            for child in descendants(self._number):
                if (found := status(child)) is not None:
                    self.others[child] = max(self.others.get(child, 0), found["VmHWM"])
                    together += found["VmRSS"]
            self.together = max(self.together, together)
            time.sleep(0.1)

    def __str__(self) -> str:
        others = ", ".join(f"{bytes_ / 1e6:.0f}" for bytes_ in sorted(self.others.values(), reverse=True))
        return f"main process {self.main / 1e6:.0f} MB, others {others} MB, together {self.together / 1e6:.0f} MB"


def status(number: int) -> dict[str, int] | None:
    """Return the resident bytes of a process, current (VmRSS) and peak (VmHWM); None if it has ended."""
    try:
        lines = Path(f"/proc/{number}/status").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}
    return sizes if "VmHWM" in sizes else None


def descendants(number: int) -> list[int]:
    """Return the ids of all descendants of a process."""
    found: list[int] = []
    for path in Path(f"/proc/{number}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


def prepare(
    text: Path, out: Path, kind: str, megabytes: float = 0.0, kill_at: float | None = None
) -> tuple[float, Memory, bool]:
    """Prepare a text in another process.

    Args:
        text: The text.
        out: Prepared folder.
        kind: Tokenizer, a key of SETTINGS.
        megabytes: Size of the text in MB, needed with `kill_at`.
        kill_at: Share of the text, 0 to 1, after which the process is killed; None: do not kill the process.

    Returns:
        Time in seconds, memory, and whether the process finished.
    """
    command = [sys.executable, "-m", "timemix", "data", str(text), "--out", str(out), *SETTINGS[kind]]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    memory = Memory(process.pid)
    while process.poll() is None:
        time.sleep(0.1)
        if kill_at is not None and share_done(out, megabytes * 1e6) >= kill_at:
            process.send_signal(signal.SIGKILL)
            process.wait()
    seconds = time.perf_counter() - began
    memory.join()
    if process.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"the preparation failed with status {process.returncode}")
    return seconds, memory, process.returncode == 0


def share_done(out: Path, size: float) -> float:
    """Return the share of a text of `size` characters that an unfinished preparation has already processed."""
    try:
        state = json.loads((out.parent / f".{out.name}.unfinished" / "unfinished.json").read_text())
    except OSError:
        return 0.0
    return sum(split["pieces"] * (1 << 20) for split in state["splits"].values()) / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the text and the prepared folders")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the text; default: 10")
    parser.add_argument("--kinds", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="tokenizers; default: all")
    parser.add_argument("--formats", nargs="+", choices=("txt", "jsonl", "parquet"), default=["txt"])
    parser.add_argument("--rounds", type=int, default=0, help="number of times to measure each format; default: 0")
    parser.add_argument("--keep", action="store_true", help="keep the text and the prepared folders")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    text = options.folder / "text.txt"
    if not text.exists() or text.stat().st_size < options.gigabytes * 1e9:
        write_text(text, int(options.gigabytes * 1e9))
    megabytes = text.stat().st_size / 1e6
    print(f"{megabytes:,.0f} MB of text", flush=True)
    sources = [text.with_suffix(f".{suffix}") for suffix in options.formats]
    for source in sources:
        if not source.exists():
            write_records(text, source)
    try:
        for kind, _, source in itertools.product(options.kinds, range(options.rounds), sources):
            prepare_once(source, kind, megabytes)
        for kind, source in itertools.product(options.kinds, () if options.rounds else sources):
            measure(source, kind, megabytes, keep=options.keep)
    finally:
        if not options.keep:
            for path in {text, *sources}:
                path.unlink()


def prepare_once(source: Path, kind: str, megabytes: float) -> None:
    """Prepare a source. `measure` describes the arguments."""
    out = source.parent / "once"
    seconds, memory, _ = prepare(source, out, kind)
    print(f"{kind}, {source.suffix}: {seconds:.1f} s, {megabytes / seconds:.1f} MB/s; {memory}", flush=True)
    shutil.rmtree(out)


def measure(source: Path, kind: str, megabytes: float, *, keep: bool) -> None:
    """Prepare a source; then kill a second preparation half way, resume it, and compare the results.

    Args:
        source: The text.
        kind: Tokenizer, a key of SETTINGS.
        megabytes: Size of the text without the marks of its format, in MB.
        keep: Whether to keep the prepared folders.
    """
    name = f"{kind}, {source.suffix}"
    whole, again = (source.parent / f"{kind}-{source.suffix[1:]}-{part}" for part in ("whole", "again"))
    for out in (whole, again):
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.parent / f".{out.name}.unfinished", ignore_errors=True)
    seconds, memory, _ = prepare(source, whole, kind)
    print(f"{name}: {seconds:.0f} s, {megabytes / seconds:.1f} MB/s; {memory}", flush=True)
    before, _, ended = prepare(source, again, kind, megabytes, kill_at=0.5)
    after, memory, _ = prepare(source, again, kind)
    same = all(path.read_bytes() == (again / path.name).read_bytes() for path in sorted(whole.iterdir())) and len(
        list(whole.iterdir())
    ) == len(list(again.iterdir()))
    print(
        f"{name}, {'not ' if ended else ''}killed after {before:.0f} s: resumed for {after:.0f} s, {memory};"
        f" {'identical files' if same else 'DIFFERENT FILES'}",
        flush=True,
    )
    if not keep:
        shutil.rmtree(whole)
        shutil.rmtree(again)


if __name__ == "__main__":
    main()
