"""Greedy tokens of both runners equal Hugging Face's, whatever the blocks and chunks."""

import pytest
import torch

from exactness import tiny_models
from exactness.driver import Driver
from pageframe.core.sampling import SamplingParams
from pageframe.executor.model.loader import load_runner

FAMILIES = sorted({*tiny_models.NAMES, *tiny_models.MIXED})
_NUM_TOKENS_IN_POOL = 768


def _driver(folder, block_size, chunk_size, runner="auto", **settings):
    loaded = load_runner(str(folder), runner=runner, device="cpu", dtype="float32", **settings)
    driver = Driver(
        loaded,
        num_blocks=_NUM_TOKENS_IN_POOL // block_size * loaded.facts.num_kv_groups,
        block_size=block_size,
        chunk_size=chunk_size,
        seed=block_size * 100 + chunk_size,
    )
    return loaded, driver


def _assert_equal(sequences, answers):
    num_stopped = 0
    for sequence, answer in zip(sequences, answers, strict=True):
        num_certain = answer.num_certain
        num_stopped += num_certain < len(answer.token_ids)
        assert sequence.output_ids[:num_certain] == answer.token_ids[:num_certain]
    # Weights were drawn so wide that this would be a fault of the test.
    assert num_stopped == 0, f"{num_stopped} answers hang on rounding"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_greedy_tokens_equal_hugging_face(tiny_model, name, block_size, chunk_size):
    folder, prompts, answers = tiny_model(name)
    runner, driver = _driver(folder, block_size, chunk_size)
    assert runner.facts.runner == ("native" if name in tiny_models.NATIVE else "transformers")
    _assert_equal(driver.generate(prompts, len(answers[0].token_ids), stagger=2), answers)
    runner.close()


@pytest.mark.parametrize("name", ["llama31", "mistral", "qwen2", "qwen3"])
def test_transformers_runner_takes_native_models_too(tiny_model, name):
    folder, prompts, answers = tiny_model(name)
    _, driver = _driver(folder, 16, 7, runner="transformers")
    _assert_equal(driver.generate(prompts, len(answers[0].token_ids)), answers)


@pytest.mark.parametrize("name", tiny_models.NATIVE)
def test_pytorch_takes_native_models_where_there_are_no_compiled_kernels(tiny_model, name):
    folder, prompts, answers = tiny_model(name)
    runner, driver = _driver(folder, 16, 7, cpu_kernels="torch")
    assert runner.facts.kernels.startswith("torch (")
    _assert_equal(driver.generate(prompts, len(answers[0].token_ids)), answers)


def test_answers_tell_models_apart(tiny_model):
    """If families agreed by accident, or answers were constant, equality would mean little."""
    answers = [tiny_model(name)[2] for name in FAMILIES]
    first = {tuple(answer[4].token_ids) for answer in answers}
    assert len(first) == len(FAMILIES)
    for family in answers:
        assert len({token for answer in family for token in answer.token_ids}) > 20


def test_sharded_checkpoint_gives_the_same_tokens(tiny_model, tmp_path):
    _, prompts, answers = tiny_model("qwen3")
    folder = tiny_models.build("qwen3", tmp_path, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    _, driver = _driver(folder, 16, 64)
    _assert_equal(driver.generate(prompts, len(answers[0].token_ids)), answers)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_on_most_tokens(tiny_model, name, dtype):
    folder, prompts, answers = tiny_model(name)
    runner = load_runner(str(folder), device="cpu", dtype=dtype)
    assert runner.facts.kv_dtype == dtype
    driver = Driver(runner, num_blocks=48, block_size=16, chunk_size=7, seed=0)
    sequences = driver.generate(prompts, 1)
    num_equal = sum(
        sequence.output_ids[0] == answer.token_ids[0]
        for sequence, answer in zip(sequences, answers, strict=True)
    )
    assert num_equal >= len(prompts) - 1


def test_keys_and_values_may_be_narrower_than_weights(tiny_model):
    folder, prompts, answers = tiny_model("llama")
    runner, driver = _driver(folder, 16, 7, kv_dtype="bfloat16")
    assert (runner.facts.dtype, runner.facts.kv_dtype) == ("float32", "bfloat16")
    assert runner.facts.kv_bytes_per_token == 3 * 2 * 2 * 8 * 2
    sequences = driver.generate(prompts, 1)
    num_equal = sum(
        sequence.output_ids[0] == answer.token_ids[0]
        for sequence, answer in zip(sequences, answers, strict=True)
    )
    assert num_equal >= len(prompts) - 1


@pytest.mark.parametrize("name", ["llama31", "opt"])
@pytest.mark.parametrize("chunk_size", [1, 7, 200])
def test_prompt_logprobs_equal_hugging_face(tiny_model, name, chunk_size):
    folder, prompts, _ = tiny_model(name)
    _, driver = _driver(folder, 16, chunk_size)
    sampling = SamplingParams(temperature=0.0, max_tokens=3, num_prompt_logprobs=2)
    sequences = driver.generate(prompts, 3, sampling=sampling)
    model = tiny_models.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, sequence in zip(prompts, sequences, strict=True):
        with torch.inference_mode():
            logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        told = sequence.prompt_logprobs
        assert told is not None
        assert [entry.token_id for entry in told] == prompt[1:]
        for position, entry in enumerate(told):
            assert entry.logprob == pytest.approx(
                float(logprobs[position, prompt[position + 1]]), abs=2e-4
            )
            assert entry.top_token_ids == logprobs[position].topk(2).indices.tolist()
