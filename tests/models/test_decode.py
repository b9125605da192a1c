"""The compiled steps agree with the model: logits and state, all weights, any rows, extreme keys."""

import functools
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.models import VARIANTS as MODELS
from tests.helpers.models import build, step_tolerance
from tests.helpers.pairwise import pairwise
from tests.helpers.runs import small_trainer
from tests.helpers.tiers import examples
from timemix.cli.main import main
from timemix.errors import InvalidValue
from timemix.generation.decode import ModelStep, build_step
from timemix.models.quantize import quantized, rounded
from timemix.models.registry import model_config
from timemix.models.rwkv1.decode import Rwkv1Step
from timemix.runtime import native

CTX = 24

VARIANTS = {
    "rwkv1": {},
    "no tables": {"alpha": False, "beta": False, "gamma": False},
    "mish": {"activation": "mish"},
    "relu2": {"activation": "relu2"},
    "silu, shift by three": {"activation": "silu", "token_shift": (0.25, 0.0, 0.5)},
    "no shift": {"token_shift": ()},
    "shift that ends": {"token_shift": (0.5,), "token_shift_top": ()},
    "odd sizes": {"channels": 21, "heads": 3, "ffn_ratio": 1.7, "vocab_size": 13},
    "wide heads": {"channels": 216, "heads": 2},
    "exponentials": {"exponentials": 4},
    "odd exponentials, taps": {"exponentials": 5, "taps": 3},
    "one exponential, no tables": {"exponentials": 1, "alpha": False, "beta": False, "gamma": False},
}
ATTENTION = {
    "rotary": {"arch": "mha_rotary"},
    "rotary, odd sizes": {"arch": "mha_rotary", "channels": 21, "heads": 3, "ffn_ratio": 1.7, "vocab_size": 13},
    "rotary, heads of 108": {"arch": "mha_rotary", "channels": 216, "heads": 2, "activation": "mish"},
    "rotary, shift by three": {"arch": "mha_shift", "token_shift": (0.25, 0.0, 0.5), "activation": "relu2"},
    "rotary, shift that ends": {"arch": "mha_shift", "token_shift": (0.5,), "token_shift_top": ()},
    "llama": {"arch": "llama"},
    "llama, grouped heads of 32": {"arch": "llama", "channels": 128, "kv_heads": 2, "norm_eps": 1e-2},
    "llama, one head of keys": {"arch": "llama", "kv_heads": 1, "rotary_base": 100.0},
    "llama, heads of 64": {"arch": "llama", "channels": 128, "heads": 2},
    "llama, a head of 140": {"arch": "llama", "channels": 140, "heads": 1},
}
VARIANTS |= ATTENTION


def model_of(variant, **changed):
    sizes = {"vocab_size": 19, "ctx_len": CTX, "layers": 2, "heads": 4, "channels": 32, "ffn_ratio": 2.5}
    fields = sizes | VARIANTS[variant] | changed
    # Otherwise wide matrices make their outputs large.
    noise = fields["channels"] ** -0.5
    arch = fields.pop("arch", "rwkv1_exp" if "exponentials" in fields else "rwkv1")
    model = build(model_config(arch, **fields), torch.float32, noise, **fields)
    if arch == "rwkv1_exp":
        with torch.no_grad():
            # Real exponentials in addition to the pairs.
            for block in model.blocks:
                block.mixer.angle[1:, :1] = 0
    return model


def begun(model, rows):
    """Return a state whose rows are at different positions."""
    lengths = torch.arange(1, rows + 1)
    tokens = torch.randint(model.config.vocab_size, (rows, rows))
    with torch.no_grad():
        _, state = model(tokens, model.init_state(rows), lengths=lengths)
    return state


@pytest.fixture(autouse=True)
def _needs_a_compiler():
    found, reason = Rwkv1Step.library()
    assert found is not None, f"these tests are of the compiled step: {reason}"


@pytest.mark.parametrize(
    ("variant", "rows", "weights"), pairwise(VARIANTS, [1, 2, 7], ["float32", "bfloat16", "int8", "int4"])
)
def test_equals_the_model_in_logits_and_state(variant, rows, weights):
    model = model_of(variant)
    expected = rounded(model, weights)
    state = begun(model, rows)
    # Past the end of the tables, if the tables have an end.
    if model.max_position is None:
        state.position += CTX - 4
    other = state.clone()
    step, tolerance = build_step(model, weights, backend="compiled"), step_tolerance(weights)
    for _ in range(8):
        tokens = torch.randint(model.config.vocab_size, (rows,))
        with torch.no_grad():
            logits, other = expected(tokens[:, None], other, logits="last")
        found, state = step(tokens, state, torch.arange(rows))
        torch.testing.assert_close(found, logits, atol=tolerance, rtol=tolerance)
        assert state.position.equal(other.position)
        for own, theirs in zip(state.layers, other.layers, strict=True):
            assert own.keys() == theirs.keys()
            for name in own:
                largest = max(1.0, float(theirs[name].abs().max()))
                torch.testing.assert_close(own[name] / largest, theirs[name] / largest, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("begin", "scale"), pairwise([0, 1, 60, 64, 65, 128, 150], [1.0, 60.0], strength=1))
def test_sums_over_the_past_equal_those_of_the_model(begin, scale):
    model = model_of("rwkv1", ctx_len=210)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.f.mul_(torch.rand_like(block.mixer.f))
            block.mixer.key.weight.mul_(scale)
    state = model.init_state(2)
    with torch.no_grad():
        if begin:
            _, state = model(torch.randint(19, (2, begin)), state)
        plain, state = state.clone(), state.clone()
        step, rows = Rwkv1Step(model, "float32"), torch.tensor([0, 1])
        for t in range(begin, 210):
            tokens = torch.randint(19, (2,))
            logits, plain = model(tokens[:, None], plain, logits="last")
            found, state = step(tokens, state, rows)
            torch.testing.assert_close(found, logits, atol=2e-5 * scale, rtol=1e-4)
            if t == begin + 9:
                # A row that starts again, and a row that is written from outside.
                state.put(torch.tensor([0]), model.init_state(1))
                plain.put(torch.tensor([0]), model.init_state(1))
            if t == begin + 30:
                for each in (state, plain):
                    each.position[1] -= 7
                    for layer in each.layers:
                        layer["numerators"][1] *= 0.5
    assert state.pending is not None
    assert state.clone().pending is None


def test_sums_over_the_past_see_writes_that_a_put_follows_also_without_counts():
    model = model_of("rwkv1", ctx_len=160)
    step, rows = Rwkv1Step(model, "float32"), torch.tensor([0, 1])
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            _, state = model(torch.randint(19, (2, 130)), model.init_state(2))
            step(torch.tensor([1, 2]), state, rows)
            for layer in state.layers:
                layer["numerators"][1] *= 0.5
            state.put(torch.tensor([0]), model.init_state(1))
            expected, _ = model(torch.tensor([[3], [4]]), state.clone(), logits="last")
            found, _ = step(torch.tensor([3, 4]), state, rows)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@functools.cache
def whole(variant, weights):
    """Return a compiled step, a text as long as the context, its logits and its state by the model's forward pass."""
    model = model_of(variant, ctx_len=150)
    tokens = torch.randint(model.config.vocab_size, (150,))
    with torch.no_grad():
        logits, state = rounded(model, weights)(tokens[None], model.init_state(1))
    return build_step(model, weights, backend="compiled"), tokens, logits[0], state


@pytest.mark.parametrize(("variant", "weights"), pairwise(ATTENTION, ["float32", "bfloat16", "int8"], strength=1))
@given(st.data())
@examples(200)
def test_attention_to_a_filled_cache_equals_that_of_the_model(variant, weights, data):
    """A piece of any length continues a cache of any length, across the blocks of 64 positions."""
    step, tokens, expected, whole_state = whole(variant, weights)
    begin = data.draw(st.integers(0, 149))
    end = data.draw(st.integers(begin + 1, 150))
    state, largest, tolerance = step.model.init_state(3), float(expected.abs().max()), step_tolerance(weights)
    for first, last in ((0, begin), (begin, end)):
        if count := last - first:
            given_to = tokens[first:last], state, torch.tensor([1]), torch.tensor([count]), torch.arange(count)
            found, state = step(*given_to)
            torch.testing.assert_close(found / largest, expected[first:last] / largest, atol=tolerance, rtol=0)
    for own, theirs in zip(state.layers, whole_state.layers, strict=True):
        for name in ("keys", "values"):
            torch.testing.assert_close(own[name][1, :, :end], theirs[name][0, :, :end], atol=10 * tolerance, rtol=1e-4)
            assert not own[name][1, :, end:].any()
            assert not own[name][[0, 2]].any()


@pytest.mark.parametrize("variant", ["rotary", "llama, heads of 64"])
def test_attention_ignores_what_the_cache_holds_past_the_text(variant):
    model = model_of(variant, ctx_len=150)
    step, tokens = build_step(model, backend="compiled"), torch.randint(19, (70,))
    found = []
    for filler in (0.0, float("inf"), float("nan")):
        state = model.init_state(2)
        for layer in state.layers:
            for x in layer.values():
                x.fill_(filler)
        logits, state = step(tokens, state, torch.tensor([1]), torch.tensor([70]), torch.arange(70))
        found += [logits]
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


@pytest.mark.parametrize("scale", [8.0, 60.0])
@pytest.mark.parametrize("variant", ["rwkv1", "rotary", "llama"])
def test_equals_the_model_for_hard_keys(variant, scale):
    model = model_of(variant)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.key.weight.mul_(scale)
    state, other = model.init_state(1), model.init_state(1)
    step = build_step(model, backend="compiled")
    for _ in range(CTX):
        token = torch.randint(model.config.vocab_size, (1,))
        with torch.no_grad():
            logits, other = model(token[:, None], other, logits="last")
        found, state = step(token, state, torch.tensor([0]))
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["compiled", "model"])
@pytest.mark.parametrize("variant", ["rwkv1", "rotary, shift by three", "llama"])
def test_some_rows_leave_the_others_alone(variant, kind):
    model = model_of(variant)
    step = build_step(model, backend=kind)
    state = begun(model, 5)
    before = state.clone()
    rows = torch.tensor([3, 0])
    found, state = step(torch.tensor([4, 5]), state, rows)
    with torch.no_grad():
        logits, part = model(torch.tensor([[4], [5]]), before.clone().select(rows), logits="last")
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    before.put(rows, part)
    assert state.position.tolist() == [2, 2, 3, 5, 5]
    for own, theirs in zip(state.layers, before.layers, strict=True):
        for name in own:
            torch.testing.assert_close(own[name], theirs[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["rwkv1", "rotary, shift by three", "llama"])
def test_wrong_tokens_and_the_end_of_the_context_change_nothing(variant):
    model = model_of(variant)
    state = model.init_state(2)
    step = build_step(model, backend="compiled")
    for token in (-1, 19):
        with pytest.raises(ValueError, match="outside the vocabulary of 19"):
            build_step(model, backend="model")(torch.tensor([1, token]), state, torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="outside the vocabulary of 19"):
            step(torch.tensor([1, token]), state, torch.tensor([0, 1]))
    assert state.position.tolist() == [0, 0]
    for wrong in (torch.tensor([0, 2]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="rows holds an index outside 0 to 1"):
            step(torch.tensor([1, 2]), state, wrong)
    state.position[1] = CTX
    with pytest.raises(ValueError, match=f"would pass {CTX}, the end"):
        step(torch.tensor([1, 2]), state, torch.tensor([0, 1]))
    assert all(not x.any() for layer in state.layers for x in layer.values())


@pytest.mark.parametrize(
    ("count", "counts", "wanted", "message"),
    [
        (1, None, None, "counts must have 2 positive numbers, one for each row, with the sum 1, the number of tokens"),
        (2, [1, 3], None, "counts must have 2 positive numbers, .* with the sum 2"),
        (2, [2], None, "counts must have 2 positive numbers"),
        (2, [2, 0], None, "counts must have 2 positive numbers"),
        (2, None, [2], "wanted holds an index outside the 2 tokens; pass indices from 0 to 1"),
        (2, [1, 1], [0, -1], "wanted holds an index outside the 2 tokens"),
        (2, None, [10**9], "wanted holds an index outside the 2 tokens"),
    ],
)
def test_counts_and_wanted_that_do_not_fit_the_tokens_are_refused(count, counts, wanted, message):
    model = build(MODELS["rwkv7"], torch.float32)
    step, state = build_step(model, backend="compiled"), model.init_state(2)
    counts, wanted = (None if each is None else torch.tensor(each) for each in (counts, wanted))
    with pytest.raises(InvalidValue, match=message):
        step(torch.ones(count, dtype=torch.int64), state, torch.tensor([0, 1]), counts, wanted)
    assert not state.position.any()


def test_eight_bits_are_within_half_a_step():
    weight = torch.randn(7, 33)
    weight[3] = 0
    integers, scale = quantized(weight)
    assert integers.dtype == torch.int8
    assert ((integers * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-7).all()
    assert integers.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127, 127]


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
@pytest.mark.parametrize("arch", ["llama", "mha_shift", "rwkv1", "rwkv1_exp", "rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_a_model_in_bfloat16_decodes_as_the_same_numbers_in_float32(arch, weights):
    model = build(model_config(arch), torch.bfloat16)
    wide = build(model_config(arch), torch.float32)
    wide.load_state_dict(model.state_dict())
    # Only the weights of a file may be in bfloat16.
    model.is_mapped = True
    found = []
    for each in (model, wide):
        step, state = build_step(each, weights), each.init_state(2)
        assert step.compiled
        for token in ([1, 2], [3, 4], [5, 6]):
            logits, state = step(torch.tensor(token), state, torch.arange(2))
        found.append(logits)
    assert torch.allclose(*found, atol=1e-5)
    state.layers[0] = {name: x.bfloat16() for name, x in state.layers[0].items()}
    with pytest.raises(InvalidValue, match="of the state is torch.bfloat16; the compiled step needs float32"):
        step(torch.tensor([1, 2]), state, torch.arange(2))


def test_eight_bits_of_bfloat16_are_within_half_a_step():
    weight = torch.randn(500, 64).bfloat16()
    integers, scale = quantized(weight)
    error = (integers * scale[:, None] - weight.float()).abs()
    assert (error <= scale[:, None] * 0.5001).all()


def test_rounding_costs_little_loss(capsys, tmp_path):
    """int8 loses less than 0.005 nats and int4 less than 0.05 nats, measured as in `timemix eval`."""
    trainer = small_trainer(tmp_path, steps=60)
    trainer.run()
    losses = {}
    for weights in ("float32", "bfloat16", "int8", "int4"):
        with pytest.raises(SystemExit):
            main(["eval", str(trainer.out), "--json", "--weights", weights])
        losses[weights] = json.loads(capsys.readouterr().out)["nats_per_token"]
    assert len(set(losses.values())) == 4
    assert abs(losses["bfloat16"] - losses["float32"]) < 0.005
    assert abs(losses["int8"] - losses["float32"]) < 0.005
    assert abs(losses["int4"] - losses["float32"]) < 0.05


@pytest.mark.parametrize("variant", ["wide heads", "rotary, shift by three", "llama, grouped heads of 32"])
def test_the_number_of_threads_is_that_of_torch_and_changes_nothing(variant):
    model = model_of(variant)
    step = build_step(model, backend="compiled")
    found, tokens, counts = [], torch.randint(19, (24,)), torch.tensor([1, 23])
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(step(tokens, model.init_state(2), torch.tensor([1, 0]), counts, torch.arange(24))[0])
    torch.set_num_threads(threads)
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


@pytest.mark.parametrize(
    ("variant", "dtype", "words"),
    [
        ("mha_pro", torch.float32, "no compiled step for mha_pro"),
        ("mha_rotary", torch.float64, "not torch.float64"),
        ("weighted", torch.float32, "weighted denominator"),
        ("free W", torch.float32, "a free W"),
        ("rwkv1", torch.float64, "not torch.float64"),
    ],
)
def test_unsupported_models_use_their_forward_with_a_reason(variant, dtype, words):
    model = build(MODELS[variant], dtype)
    step = build_step(model)
    assert isinstance(step, ModelStep)
    assert words in step.reason
    with pytest.raises(ValueError, match=words):
        build_step(model, backend="compiled")
    state = model.init_state(1)
    logits, state = step(torch.tensor([1]), state, torch.tensor([0]))
    assert logits.shape == (1, model.config.vocab_size)


def test_without_a_compiler_the_model_is_used_with_a_notice(monkeypatch, tmp_path):
    model = model_of("rwkv1")
    native.library.cache_clear()
    monkeypatch.setenv("CC", str(tmp_path / "nothing"))
    try:
        step = build_step(model)
        assert isinstance(step, ModelStep)
        assert step.reason == f"no C compiler was found: CC is '{tmp_path / 'nothing'}'"
        broken = tmp_path / "broken"
        broken.write_text("#!/bin/sh\necho 'step.c: in its midst\nerror: it is broken' >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CC", str(broken))
        native.library.cache_clear()
        assert build_step(model).reason == f"{broken} failed: error: it is broken"
    finally:
        native.library.cache_clear()


def test_the_compiled_code_is_kept_mended_and_done_without_a_cache(monkeypatch, tmp_path):
    model = model_of("rwkv1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # It is compiled four times here; other tests check its results.
    monkeypatch.setattr(native, "COMPILE", ("-O0", "-march=native", "-fPIC"))
    calls = tmp_path / "calls"
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", f"{compiler} -O1")

    def build():
        native.library.cache_clear()
        calls.write_text("")
        step = build_step(model, backend="compiled")
        step(torch.tensor([1]), model.init_state(1), torch.tensor([0]))
        return len(calls.read_text().splitlines())

    try:
        # Three calls: version, compiling, linking.
        assert build() == 3
        assert build() == 1
        (kept,) = (tmp_path / "timemix").glob("step-*.so")
        damaged = tmp_path / "second" / "timemix" / kept.name
        damaged.parent.mkdir(parents=True)
        damaged.write_bytes(b"cut off")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
        assert build() == 3
        assert damaged.stat().st_size == kept.stat().st_size
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert build() == 3
        # Compiled without OpenMP.
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec cc "$@"\n')
        assert build() == 4
    finally:
        native.library.cache_clear()


def test_a_changed_header_gives_a_new_library(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source, header = tmp_path / "answer.c", tmp_path / "inner.h"
    (tmp_path / "outer.h").write_text('# include "inner.h"\n')
    source.write_text('#include "outer.h"\n#include "ops/common/types.h"\nint answer(void) { return ANSWER; }\n')

    def answer(value):
        header.write_text(f"#ifndef ANSWER\n#define ANSWER {value}\n#endif\n")
        native.library.cache_clear()
        found, reason = native.library(source)
        assert found is not None, reason
        return found.answer(), len(list((tmp_path / "timemix").glob("answer-*.so")))

    assert answer(1) == (1, 1)
    assert answer(2) == (2, 2)
    # Cached, by content.
    assert answer(1) == (1, 2)
    native.library.cache_clear()
    assert native.library(source, "-DANSWER=3")[0].answer() == 3


def test_importing_compiles_nothing(tmp_path):
    code = "import timemix.models.rwkv1.decode, timemix.generation.engine"
    subprocess.run([sys.executable, "-c", code], check=True, env={"XDG_CACHE_HOME": str(tmp_path), "PATH": ""})
    assert not list(tmp_path.iterdir())
