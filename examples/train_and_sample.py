"""Train a small RWKV on a text, then print text that it generates, in about half a minute on two cores.

python examples/train_and_sample.py                      # the text that comes with timemix
python examples/train_and_sample.py my.txt --steps 2000  # your own text, longer
"""

import argparse
import tempfile

import timemix

parser = argparse.ArgumentParser(description="Train a small RWKV on a text, then print text that it generates.")
parser.add_argument("text", nargs="?", default="builtin", help="text file (default: the text that comes with timemix)")
parser.add_argument("--steps", type=int, default=600, help="optimizer steps (default: 600)")
options = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    # A run folder holds checkpoints, settings and losses. This example deletes its run folder. To keep a run folder,
    # give a path outside the temporary folder.
    run = timemix.train("cpu-small", f"{folder}/run", data=options.text, train={"steps": options.steps})
    print(f"held-out loss: {timemix.evaluate(run).nats_per_token:.3f} nats per character\n")

for piece in timemix.stream(run, "\n", tokens=400, sampler=timemix.Sampler(top_a=0.02)):
    print(piece, end="", flush=True)
print()
