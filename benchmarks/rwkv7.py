"""Compare RWKV-7 of timemix with the programs that people use, alternating in one process.

python benchmarks/rwkv7.py training            training steps, beside rwkv7-hf, our Llama, and the Llama of transformers
python benchmarks/rwkv7.py training-of-earlier    training steps of RWKV-4 to 6, beside RWKV-4 of transformers
python benchmarks/rwkv7.py write-hf FOLDER     a random model as a Hugging Face folder, from which llama.cpp converts
python benchmarks/rwkv7.py generation --gguf FOLDER    decode and prefill, beside llama.cpp and the package rwkv

A program that is not installed is skipped, with a message. rwkv7-hf, rwkv and transformers come from PyPI. llama.cpp
lies in the source archive of llama-cpp-python: build the target `llama` in Release mode, then set LLAMA_CPP_LIB_PATH to
the folder of libllama.so and PYTHONPATH to the folder of the package llama_cpp. The folder of --gguf holds f32.gguf,
bf16.gguf, q8_0.gguf and q4_0.gguf, which convert_hf_to_gguf.py and llama-quantize write from the folder of `write-hf`.

If the logits of two programs differ, the figures are withheld. `--json` gets the results after every part. A repeated
command continues after the parts in that file. `--toy` runs the same code with tiny models.
"""

import argparse
from pathlib import Path

from other_programs import write_hf
from rwkv7_common import Record
from rwkv7_generation import PUBLISHED, generation, published_size
from rwkv7_training import REAL, TOY, training, training_of_earlier


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("training", "training-of-earlier", "generation", "write-hf"))
    parser.add_argument("folder", type=Path, nargs="?", help="folder of write-hf")
    parser.add_argument("--size", choices=PUBLISHED, default="0.19 B", help="size for generation and write-hf")
    parser.add_argument("--gguf", type=Path, help="folder of the GGUF files of --size")
    parser.add_argument("--json", type=Path, default=Path("runs/rwkv7.json"), help="file of the results")
    parser.add_argument("--seconds", type=float, default=4.0, help="time of each contender of generation")
    parser.add_argument("--longest", type=int, default=4096, help="largest prompt of generation, in tokens")
    parser.add_argument("--toy", action="store_true", help="use tiny models")
    asked = parser.parse_args(arguments)
    if asked.part == "training":
        training(Record(asked.json), TOY if asked.toy else REAL)
    elif asked.part == "training-of-earlier":
        training_of_earlier(Record(asked.json), TOY if asked.toy else REAL)
    elif asked.part == "generation":
        generation(Record(asked.json), asked.size, asked.gguf, asked.toy, asked.seconds, asked.longest)
    elif asked.folder is None:
        parser.error("write-hf needs a folder")
    else:
        write_hf(published_size(asked.size, asked.toy), asked.folder)


if __name__ == "__main__":
    main()
