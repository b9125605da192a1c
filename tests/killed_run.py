"""A run that can be killed at a known instant: it says each step and each part of a slowed save as it begins.

python -m tests.killed_run FOLDER TOKENS SECONDS: goes on with the run in FOLDER, or begins it on the prepared TOKENS;
writing each file of a checkpoint takes SECONDS longer.
"""

import sys
import time
from pathlib import Path

from tests.runs import small_config, with_model
from timemix.storage import files
from timemix.training.start import new_run, resume_run

CONFIG = {"steps": 30, "save_every": 7, "valid_every": 10, "log_every": 4, "accumulation": 2}


def config(tokens: Path):
    return with_model(small_config(tokens, **CONFIG), dropout=0.1)


def main() -> None:
    folder, tokens, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    trainer = resume_run(folder) if folder.exists() else new_run(config(tokens), folder)
    sync = files._sync

    def slow_sync(path: Path) -> None:
        print("saving", flush=True)
        time.sleep(seconds)
        sync(path)

    files._sync = slow_sync
    trainer.run(lambda progress: print("step", flush=True))


if __name__ == "__main__":
    main()
