"""Falcon's three designs on the native runner say what Hugging Face says, however a run is cut up.

Their transformers code calls no attention interface, so no other runner can take them.
"""

import pytest
import torch

from exactness import tiny_models
from exactness.driver import Driver
from exactness.serving import Shape, serve
from pageframe.core.errors import UnimplementedError
from pageframe.core.plan import Recovery
from pageframe.core.sampling import SamplingParams
from pageframe.executor.model.loader import load_runner

FAMILIES = pytest.mark.parametrize("name", tiny_models.FALCONS)
BLOCK_SIZES = (1, 16, 64)
CHUNKS = (1, 7, 64)
MAX_NEW_TOKENS = 14
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS, ignore_eos=True)


def _load(folder, **settings):
    return load_runner(str(folder), device="cpu", dtype="float32", **settings)


def _assert_equal(outputs, answers):
    for token_ids, answer in zip(outputs, answers, strict=True):
        certain = answer.num_certain
        assert len(token_ids) == len(answer.token_ids)
        assert token_ids[:certain] == answer.token_ids[:certain]
    assert sum(answer.num_certain == MAX_NEW_TOKENS for answer in answers) >= len(answers) - 1


@FAMILIES
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_greedy_tokens_equal_hugging_face(tiny_model, name, block_size, chunk_size):
    folder, prompts, answers = tiny_model(name)
    runner = _load(folder)
    assert (runner.facts.runner, runner.facts.max_model_len) == ("native", 512)
    assert runner.facts.kernels == "torch (no kernels for falcon models)"
    driver = Driver(
        runner,
        num_blocks=768 // block_size,
        block_size=block_size,
        chunk_size=chunk_size,
        seed=block_size * 100 + chunk_size,
    )
    sequences = driver.generate(prompts, MAX_NEW_TOKENS, stagger=2)
    _assert_equal([sequence.output_ids for sequence in sequences], answers)
    runner.close()


@FAMILIES
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_no_token_changes_when_every_request_loses_its_blocks(tiny_model, name, block_size, chunk):
    folder, prompts, answers = tiny_model(name)
    longest = max(map(len, prompts)) + MAX_NEW_TOKENS
    shape = Shape(
        num_blocks=-(-longest // block_size),
        block_size=block_size,
        prefill_chunk_tokens=chunk,
        lookahead=block_size != chunk,
        loses_each_request=True,
    )
    runner = _load(folder)
    _assert_equal(serve(runner, prompts, GREEDY, shape).token_ids, answers)
    runner.close()


@FAMILIES
@pytest.mark.parametrize("recovery", list(Recovery), ids=lambda recovery: recovery.name.lower())
def test_a_small_pool_preempts_and_changes_no_token(tiny_model, name, recovery):
    folder, prompts, answers = tiny_model(name)
    # Long prompts first leave the decodes of the others no room to grow.
    order = (5, 2, 0, 1, 3, 4, 6, 7)
    longest = max(map(len, prompts)) + MAX_NEW_TOKENS
    shape = Shape(
        num_blocks=longest,
        block_size=1,
        prefill_chunk_tokens=64,
        lookahead=True,
        num_host_slots=2 * longest,
        recovery=recovery,
    )
    runner = _load(folder)
    served = serve(runner, [prompts[i] for i in order], GREEDY, shape)
    runner.close()
    _assert_equal(served.token_ids, [answers[i] for i in order])
    assert served.num_preemptions > 0


@FAMILIES
def test_long_sequences_say_what_hugging_face_says(tmp_path, name):
    """Past 256 positions, where Hugging Face's ALiBi rounds positions themselves to bfloat16."""
    folder = tiny_models.build(name, tmp_path)
    prompts = tiny_models.prompts((480, 300, 257), seed=4)
    answers = tiny_models.hf_greedy(folder, prompts, MAX_NEW_TOKENS)
    runner = _load(folder)
    driver = Driver(runner, num_blocks=80, block_size=16, chunk_size=200, seed=0)
    sequences = driver.generate(prompts, MAX_NEW_TOKENS)
    _assert_equal([sequence.output_ids for sequence in sequences], answers)
    runner.close()


@FAMILIES
def test_logprobs_of_prompts_equal_hugging_face(tiny_model, name):
    folder, prompts, _ = tiny_model(name)
    runner = _load(folder)
    driver = Driver(runner, num_blocks=48, block_size=16, chunk_size=7, seed=0)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, num_prompt_logprobs=0)
    sequences = driver.generate(prompts, 1, sampling=sampling)
    model = tiny_models.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, sequence in zip(prompts, sequences, strict=True):
        with torch.inference_mode():
            logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        told = [entry.logprob for entry in sequence.prompt_logprobs]
        expected = [float(logprobs[at, token]) for at, token in enumerate(prompt[1:])]
        assert told == pytest.approx(expected, abs=2e-4)
    runner.close()


@FAMILIES
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "fp8"])
def test_narrow_keys_and_values_agree_on_most_tokens(tiny_model, name, kv_dtype):
    folder, prompts, answers = tiny_model(name)
    runner = _load(folder, kv_dtype=kv_dtype)
    driver = Driver(runner, num_blocks=48, block_size=16, chunk_size=64, seed=0)
    sequences = driver.generate(prompts, 1)
    num_equal = sum(
        sequence.output_ids[0] == answer.token_ids[0]
        for sequence, answer in zip(sequences, answers, strict=True)
    )
    assert num_equal >= len(prompts) - 1
    runner.close()


def test_answers_tell_the_designs_apart(tiny_model):
    firsts = {tuple(tiny_model(name)[2][4].token_ids) for name in tiny_models.FALCONS}
    assert len(firsts) == len(tiny_models.FALCONS)


def test_no_other_runner_takes_them(tiny_model):
    with pytest.raises(UnimplementedError) as caught:
        _load(tiny_model("falcon-7b")[0], runner="transformers")
    assert caught.value.reason == "MODEL_UNSUPPORTED"
