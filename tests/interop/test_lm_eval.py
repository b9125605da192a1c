"""Tasks of lm-evaluation-harness: three routes give equal numbers, and every wrong task has a clear message."""

import json
import math
import subprocess
import sys

import pytest
import torch

import timemix
from tests.helpers.commands import run_command
from tests.helpers.runs import TEXT, small_config, with_model
from tests.helpers.serving import served
from timemix.errors import InvalidValue
from timemix.evaluation.texts import evaluate_text
from timemix.generation.engine import Engine
from timemix.generation.sampler import Sampler
from timemix.interop.export import export_run
from timemix.server.engine_thread import Served

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

QUESTIONS = [
    {"context": "the cat sat on mat 1. the", "choices": [" dog", " cat", " sun and moon"], "answer": 0},
    {"context": "the dog ran", "choices": [" to hut", " on mat", " t"], "answer": 0},
    {"context": "the dog ran", "choices": [" around", " to hut 3!", "o"], "answer": 1},
    {"context": "t", "choices": ["he", "o", "n"], "answer": 2},
]
TEXTS = [{"text": TEXT[10 * i : 10 * i + 9 + 2 * i]} for i in range(6)]
HEAD = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/{data}.jsonl}}}}\ntest_split: test\n"
TASKS = {
    "my_choice": (
        "questions",
        "output_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}, {metric: brier_score}]\n",
    ),
    "my_ending": (
        "questions",
        "output_type: loglikelihood\ndoc_to_text: '{{context}}'\ndoc_to_target: '{{choices[0]}}'\n"
        "target_delimiter: ''\nmetric_list: [{metric: perplexity}, {metric: acc}]\n",
    ),
    "my_text": (
        "texts",
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]\n",
    ),
    "my_answer": (
        "questions",
        "output_type: generate_until\ndoc_to_text: '{{context}}'\ndoc_to_target: '{{expected}}'\n"
        "generation_kwargs: {until: ['!'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n",
    ),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", params=["rwkv7", "rwkv1"])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    config = with_model(small_config(folder / "text.txt", request.param, steps=60), ctx_len=40)
    timemix.train(config, folder / "run")
    run = timemix.load(folder / "run")
    write_tasks(folder / "tasks", run)
    return run


def folder_of(loaded):
    return loaded.folder.parents[2]


def write_tasks(folder, run):
    folder.mkdir()
    greedy = timemix.Sampler(temperature=0)
    answers = [timemix.generate(run, each["context"], tokens=8, sampler=greedy, stop="!") for each in QUESTIONS]
    # Two of the four answers are those of the model.
    questions = [
        each | {"expected": text if i % 2 else "?" + text}
        for i, (each, (text,)) in enumerate(zip(QUESTIONS, answers, strict=True))
    ]
    for name, rows in (("questions", questions), ("texts", TEXTS)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for name, (data, rest) in TASKS.items():
        text = f"task: {name}\n" + HEAD.format(folder=folder, data=data) + rest
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def own(loaded, *tasks, **options):
    from timemix.interop.lm_eval import evaluate_tasks

    scores = evaluate_tasks(loaded, tasks, include=folder_of(loaded) / "tasks", **options)
    return {(score.task, score.metric): score.value for score in scores}


def other(loaded, route, **arguments):
    """Return the numbers of another route."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder_of(loaded) / "tasks"), include_defaults=False)
    found = simple_evaluate(
        model=route, model_args=arguments, tasks=list(TASKS), task_manager=manager, batch_size=4, log_samples=False
    )
    return {
        (task, key.partition(",")[0]): value
        for task, values in found["results"].items()
        for key, value in values.items()
        if "stderr" not in key and "," in key
    }


def test_an_exported_folder_gives_equal_numbers(loaded):
    import timemix.hf  # noqa: F401

    expected = own(loaded, *TASKS)
    assert len(expected) == 8
    assert expected["my_answer", "exact_match"] == 0.5
    export_run(folder_of(loaded) / "run", "hf", folder_of(loaded) / "hf")
    folder = str(folder_of(loaded) / "hf")
    found = other(loaded, "hf", pretrained=folder, device="cpu", dtype="float32")
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_a_served_model_gives_equal_numbers(loaded):
    pytest.importorskip("tenacity", reason="needs lm_eval[api]")
    pytest.importorskip("tiktoken", reason="needs lm_eval[api]")
    with served([Served("mine", Engine(loaded.model, loaded.tokenizer), "float32", 1)]) as server:
        limit = loaded.model.max_position
        arguments = {
            "model": "mine",
            "base_url": f"{server.url}/v1/completions",
            "custom_prefix_token_id": int(loaded.tokenizer.encode("\n")[0]),
            "max_length": 2049 if limit is None else limit + 1,
            "tokenizer_backend": "remote",
        }
        found = other(loaded, "local-completions", **arguments)
    assert found == pytest.approx(own(loaded, *TASKS), abs=1e-4, rel=1e-6)


def test_numbers_by_the_formula(loaded):
    """Each continuation alone, in one call of the model."""
    from lm_eval.api.instance import Instance

    from timemix.interop.lm_eval import TimemixLM

    model = TimemixLM(loaded.model, loaded.tokenizer)
    pairs = [(each["context"], choice) for each in QUESTIONS for choice in each["choices"]]
    pairs += [("", "the cat"), ("the cat ", "sat")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, continuation), (score, is_greedy) in zip(pairs, model.loglikelihood(requests), strict=True):
        ids = torch.tensor(loaded.tokenizer.encode((context or "\n") + continuation).astype("int64"))
        with torch.no_grad():
            logits = loaded.model(ids[None])[0][0].double().log_softmax(-1)
        # The harness counts spaces at the end of a context as part of the continuation.
        n = len(continuation) + len(context) - len(context.rstrip())
        begin = len(ids) - n
        assert score == pytest.approx(sum(logits[i - 1, ids[i]].item() for i in range(begin, len(ids))), abs=1e-4)
        assert is_greedy == all(logits[i - 1].argmax() == ids[i] for i in range(begin, len(ids)))


def test_a_text_equals_that_of_timemix_eval(loaded):
    """The newline before the text is the token that `timemix eval` does not predict."""
    text = TEXT[:1500] if loaded.model.max_position is None else TEXT[: loaded.model.max_position]
    (folder_of(loaded) / "tasks/texts.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    try:
        found = own(loaded, "my_text")["my_text", "bits_per_byte"]
    finally:
        rows = "".join(json.dumps(row) + "\n" for row in TEXTS)
        (folder_of(loaded) / "tasks/texts.jsonl").write_text(rows, encoding="utf-8")
    carry = loaded.model.max_position is None
    expected = evaluate_text(loaded.model, loaded.tokenizer, "\n" + text, carry_state=carry).bits_per_byte
    assert found == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(found)


def test_examples_in_prompts(loaded):
    """With examples, the contexts are longer, and a task whose file sets 0 examples has none."""
    folder = folder_of(loaded) / "tasks"
    text = (folder / "my_ending.yaml").read_text()
    assert own(loaded, "my_ending", shots=1) != own(loaded, "my_ending") == own(loaded, "my_ending", shots=0)
    (folder / "fixed.yaml").write_text(text.replace("my_ending", "fixed") + "num_fewshot: 0\n")
    try:
        assert list(own(loaded, "fixed", shots=1).values()) == list(own(loaded, "my_ending").values())
    finally:
        (folder / "fixed.yaml").unlink()


def test_each_context_is_read_once(loaded, monkeypatch):
    from lm_eval.api.instance import Instance

    from timemix.interop.lm_eval import TimemixLM

    read = []
    model = TimemixLM(loaded.model, loaded.tokenizer)
    monkeypatch.setattr(TimemixLM, "_read", lambda self, ids, old=TimemixLM._read: read.append(ids) or old(self, ids))
    requests = [Instance("loglikelihood", {}, ("the dog", choice), 0) for choice in (" ran", " sat", " r", "s")]
    model.loglikelihood(requests)
    assert read == [loaded.tokenizer.encode("the dog").tolist()]


def test_the_command(loaded, capsys):
    folder = folder_of(loaded)
    status, out, _ = run_command(capsys, "eval", folder / "run", "--tasks", folder / "tasks/my_choice.yaml")
    assert status == 0
    head, _, row, *_ = out.splitlines()
    assert head == "| task | shots | metric | value | standard error |"
    assert row.startswith("| my_choice | 0 | acc | ")
    status, out, _ = run_command(capsys, "eval", folder / "run", "--tasks", folder / "tasks", "--limit", 2, "--json")
    scores = json.loads(out)["scores"]
    assert {score["task"] for score in scores} == set(TASKS)
    include = ("--include-path", folder / "tasks", "--num-fewshot", 0)
    assert run_command(capsys, "eval", folder / "run", "--tasks", "my_text", "my_choice", *include)[0] == 0


@pytest.mark.parametrize("loaded", ["rwkv7"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--tasks", "none.yaml"), "there is no file none.yaml; name a YAML file of a task, or the name of a task"),
        (("--tasks", "my_text", "--include-path", "none"), "there is no folder none; name a folder with YAML files"),
        (("--tasks", "."), "the folder . has no YAML file of a task; name another folder"),
        (("--tasks", "empty.yaml"), "empty.yaml cannot be evaluated ("),
        (("--tasks", "wrong.yaml"), "wrong.yaml cannot be evaluated ("),
        (("--tasks", "hub.yaml"), "hub.yaml cannot be evaluated ("),
        (("--tasks", "greek.yaml"), "the vocabulary has no 'Ω' (U+03A9); leave it out of the text"),
        (("--tasks", "beams.yaml"), "the task has the generation argument 'length_penalty', which timemix does not"),
        (("--tasks", "five.yaml"), "the task has num_beams=5, but timemix has no beam search; change the task"),
        (("--tasks", "lambadaa"), "unknown task 'lambadaa'; did you mean 'lambada'?"),
        (("--tasks", "a", "--data", "b.txt"), "--data is for a text, not for tasks; leave out --data or --tasks"),
        (("--tasks",), "--tasks has no task; name at least one task"),
        (("--limit", 3), "--limit needs tasks; add --tasks TASK"),
        (("--tasks", "a", "--limit", 0), "--limit is 0; it must be at least 1"),
        (("--tasks", "a", "--precision", "auto"), "--precision is auto, but tasks are evaluated in float32; leave it"),
    ],
)
def test_wrong_tasks(loaded, arguments, sentence, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tasks"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    (folder / "empty").mkdir()
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "wrong.yaml").write_text(
        "task: wrong\ndataset_path: json\ndataset_kwargs: {data_files: {test: no.jsonl}}\n"
    )
    (tmp_path / "hub.yaml").write_text("task: hub\ndataset_path: someone/something\ntest_split: test\n")
    (tmp_path / "greek.jsonl").write_text(json.dumps({"text": "Ω"}) + "\n")
    head = HEAD.format(folder=tmp_path, data="greek")
    (tmp_path / "greek.yaml").write_text(f"task: greek\n{head}{TASKS['my_text'][1]}")
    answer = "output_type: generate_until\ndoc_to_text: a\ndoc_to_target: a\nmetric_list: [{metric: exact_match}]\n"
    wish = "generation_kwargs: {until: ['!'], length_penalty: 2}\n"
    (tmp_path / "beams.yaml").write_text(f"task: beams\n{head}{answer}{wish}")
    (tmp_path / "five.yaml").write_text(
        f"task: five\n{head}{answer}{wish.replace('length_penalty: 2', 'num_beams: 5')}"
    )
    if arguments == ("--tasks", "."):
        monkeypatch.chdir(folder)
    status, out, err = run_command(capsys, "eval", loaded.folder, *arguments)
    assert (status, out) == (2, "")
    assert f"timemix: {sentence}" in err
    assert "Traceback" not in err


def test_an_answer_longer_than_the_context(loaded):
    from timemix.interop.lm_eval import TimemixLM

    limit = loaded.model.max_position
    model = TimemixLM(loaded.model, loaded.tokenizer)
    if limit is None:
        assert len(model._loglikelihood_tokens([(None, [1], [2] * 1200)])) == 1
    else:
        assert len(model._loglikelihood_tokens([(None, [1] * 90, [2] * limit)])) == 1
        with pytest.raises(InvalidValue, match="an answer of the task has 41 tokens, but the context of the model has"):
            model._loglikelihood_tokens([(None, [1], [2] * (limit + 1))])


def test_answers_without_tokens_and_contexts_of_white_space(loaded):
    from lm_eval.api.instance import Instance

    from timemix.interop.lm_eval import TimemixLM

    model = TimemixLM(loaded.model, loaded.tokenizer)
    with pytest.raises(InvalidValue, match="an answer of the task has no tokens of its own after its context"):
        model.loglikelihood([Instance("loglikelihood", {}, ("the dog", ""), 0)])
    # lm-eval moves the white space to the answer, which then begins the text.
    ((score, _),) = model.loglikelihood([Instance("loglikelihood", {}, (" ", "ran"), 0)])
    ((expected, _),) = model.loglikelihood([Instance("loglikelihood", {}, ("", " ran"), 0)])
    assert score == pytest.approx(expected, abs=1e-5)


def test_penalties_hold_for_the_most_probable_token(loaded):
    from timemix.interop.lm_eval import TimemixLM

    model = TimemixLM(loaded.model, loaded.tokenizer)
    given = {"until": [], "do_sample": False, "repetition_penalty": 5.0}
    assert model._request(0, "the", given).sampler == Sampler(temperature=0, repetition_penalty=5.0)


def test_the_message_without_the_package(loaded):
    code = f"""
import sys
sys.modules["lm_eval"] = None
from timemix.cli.main import main
main(["eval", {str(loaded.folder)!r}, "--tasks", "a"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "timemix: the package lm_eval is not installed; run: pip install 'timemix[lm-eval]'\n"
