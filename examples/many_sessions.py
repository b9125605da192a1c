"""Generate many texts at once in one engine. The example takes about half a minute on two cores.

Texts join and leave the engine at any step. The example adds six prompts one after another. The example streams the
first text, cancels the second text, and forks the third text. The example saves the fourth text to a file, and resumes
the text from this file. No text depends on other texts: the last line of the output checks this independence.

    python examples/many_sessions.py                  # trains a small model first
    python examples/many_sessions.py --run runs/mine  # a model of your own
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import timemix
from timemix import Engine, Request, Sampler

PROMPTS = ("The ", "If the ", "A class ", "When ", "In this ", "It ")
SAMPLER = Sampler(temperature=0.9, top_a=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run many texts at once in one engine.")
    parser.add_argument("--run", help="run folder (default: train a small model)")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps without --run (default: 400)")
    parser.add_argument("--tokens", type=int, default=80, help="tokens of each text, at least 20 (default: 80)")
    options = parser.parse_args()
    tokens, half = max(20, options.tokens), max(20, options.tokens) // 2

    with tempfile.TemporaryDirectory() as folder:
        if options.run:
            run = timemix.load(options.run)
        else:
            run = timemix.train("cpu-small", f"{folder}/run", train={"steps": options.steps})
        saved = Path(folder) / "session"

        # Four slots: at most four texts are active. All other texts are pending until an active text ends.
        engine = Engine(run.model, run.tokenizer, slots=4)

        def request(number: int, length: int) -> Request:
            ids = run.tokenizer.encode(PROMPTS[number]).tolist()
            # The seed makes a text reproducible. keep_session returns the state of the text with the last event.
            return Request(ids, length, SAMPLER, seed=number, keep_session=True)

        texts: dict[int, str] = defaultdict(str)
        # The fourth text stops half way, so that the example can save it. Ids count from 0, in the order of `add`.
        lengths = [tokens, tokens, tokens, half, tokens, tokens]
        arriving = [request(number, length) for number, length in enumerate(lengths)]
        step, forked, resumed, cancelled_at = 0, -1, -1, 0
        print(f"text 0, streamed: {PROMPTS[0]}", end="")
        while engine.busy or arriving:
            # A new prompt joins at every third step, while earlier texts continue.
            if arriving and step % 3 == 0:
                engine.add(arriving.pop(0))
            for event in engine.step():
                texts[event.id] += event.text
                if event.id == 0:
                    print(event.text, end="\n\n" if event.finished else "", flush=True)
                if event.id == 3 and event.finished and event.session is not None:
                    # Save the session to a file, and resume the session from this file, as another process could.
                    timemix.save_session(event.session, saved, run.model)
                    start = timemix.load_session(saved, run.model)
                    resumed = engine.add(Request([], tokens - half, SAMPLER, seed=3, start=start))
            if forked < 0 and len(texts[2]) == half:
                # A copy of the session continues with another seed. The original session does not change.
                forked = engine.add(Request([], tokens - half, SAMPLER, seed=99, start=engine.session(2)))
                common = texts[2]
            if not cancelled_at and len(texts[1]) == 12:
                engine.cancel(1)
                cancelled_at = step
            step += 1

        print(f"text 1, cancelled at step {cancelled_at}: {(PROMPTS[1] + texts[1])!r}\n")
        print(f"text 2, its beginning:  {(PROMPTS[2] + common)!r}")
        print(f"        it continued:   {texts[2][len(common) :]!r}")
        print(f"        its fork:       {texts[forked]!r}\n")
        print(f"text 3, until saved:    {(PROMPTS[3] + texts[3])!r} ({saved.stat().st_size:,} bytes)")
        print(f"        after loading:  {texts[resumed]!r}\n")
        for number in (4, 5):
            print(f"text {number}: {(PROMPTS[number] + texts[number])!r}\n")

        # Generate each text again alone, to compare.
        alone = {
            number: timemix.generate(run, PROMPTS[number], tokens=tokens, seed=number, sampler=SAMPLER)[0]
            for number in (0, 2, 3, 4, 5)
        }
        texts[3] += texts[resumed]
        same = [number for number, text in alone.items() if texts[number] == text]
        print(f"{step} steps; equal to the same text generated alone: {len(same)} of {len(alone)}")


if __name__ == "__main__":
    main()
