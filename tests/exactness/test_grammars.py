"""Outputs follow their grammars, whatever happens on the way; others notice nothing.

A model with random weights would say anything, so whatever has a form was given it. Each run is
compared with the same requests in a roomy pool, one token a step.
"""

import json
import re
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from exactness import embedded
from exactness.serving import Shape, serve
from pageframe.core.grammar import Grammar, GrammarForm
from pageframe.core.plan import Recovery
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.executor.model.loader import load_runner
from pageframe.gateway.tokenizer import TextCodec
from unit.executor.played_drafter import KnowingDrafter
from unit.gateway.tiny_tokenizers import byte_level

SEED = 20
NUM_SCHEMAS = 20
NUM_NEIGHBOURS = 4
MAX_TOKENS = 200
END = 1
ROOMY = Shape(
    num_blocks=24 * 32,
    block_size=16,
    prefill_chunk_tokens=0,
    lookahead=False,
    max_num_sequences=24,
    token_budget=256,
)
TIGHT = replace(ROOMY, num_blocks=64, block_size=4, lookahead=True)
EXPRESSIONS = [r"[0-9]{3}-[0-9]{4}", r"(yes|no|perhaps)", r"[^\n]{12,40}\.", r"(é|ß|[a-c]){5,9}"]


def _random_schema(rng: np.random.Generator, depth: int = 0) -> dict:
    """Any schema of which each instance is short."""
    kinds = ["integer", "string", "enum", "boolean", "const", "pattern"]
    kinds += ["object", "array", "anyOf"] * (depth < 2)
    kind = "object" if depth == 0 else kinds[rng.integers(len(kinds))]
    if kind == "integer":
        return {"type": "integer", "minimum": int(rng.integers(-99, 1)), "maximum": 500}
    if kind == "string":
        return {"type": "string", "maxLength": int(rng.integers(1, 9))}
    if kind == "enum":
        return {"enum": ["the", "quick fox", "日本", 7, None, True][: rng.integers(1, 7)]}
    if kind == "const":
        return {"const": {"a": [1, "x"]}}
    if kind == "pattern":
        return {"type": "string", "pattern": "^[a-f]{2,6}$"}
    if kind == "array":
        items = _random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": 1, "maxItems": 3}
    if kind == "anyOf":
        return {"anyOf": [_random_schema(rng, depth + 1) for _ in range(2)]}
    if kind == "object":
        names = [f"p{index}" for index in range(rng.integers(1, 4))]
        return {
            "type": "object",
            "properties": {name: _random_schema(rng, depth + 1) for name in names},
            "required": names[: rng.integers(len(names) + 1)],
            "additionalProperties": False,
        }
    return {"type": "boolean"}


class House:
    """A tiny model with a tokeniser, requests of all kinds, and what each gets undisturbed."""

    def __init__(self, folder):
        byte_level(folder)
        self.codec = TextCodec.load(folder)
        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=448, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
            initializer_range=0.2, bos_token_id=0, eos_token_id=END,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        self._folder = folder
        print(f"seed {SEED}")
        rng = np.random.default_rng(SEED)
        self.schemas = [_random_schema(rng) for _ in range(NUM_SCHEMAS)]
        grammars = [Grammar(GrammarForm.JSON_SCHEMA, json.dumps(one)) for one in self.schemas]
        grammars += [Grammar(GrammarForm.REGEX, text) for text in EXPRESSIONS]
        self.wishes = [
            SamplingParams(
                temperature=float(rng.choice([0.0, 0.7, 1.3])),
                frequency_penalty=1.0,
                seed=int(rng.integers(2**63)),
                max_tokens=MAX_TOKENS if grammar else 40,
                grammar=grammar,
            )
            for grammar in [*grammars, *[None] * NUM_NEIGHBOURS]
        ]
        self.prompts = [rng.integers(2, 400, rng.integers(3, 40)).tolist() for _ in self.wishes]
        self.undisturbed = self.serve(ROOMY)

    def serve(self, shape, which=slice(None), **options):
        runner = load_runner(str(self._folder), device="cpu", dtype="float32", max_num_sequences=24)
        served = serve(runner, self.prompts[which], self.wishes[which], shape, **options)
        runner.close()
        return served


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return House(tmp_path_factory.mktemp("grammars") / "model")


def test_whatever_ends_by_itself_is_what_was_asked_for(house):
    texts = [
        house.codec.decode(ids, skip_special_tokens=True) for ids in house.undisturbed.token_ids
    ]
    reasons = [completions[0].finish_reason for completions in house.undisturbed.completions]
    for text, schema, reason in zip(texts, house.schemas, reasons, strict=False):
        assert reason is FinishReason.STOP, (text, schema)
        jsonschema.validate(json.loads(text), schema)
    for text, expression in zip(texts[NUM_SCHEMAS:], EXPRESSIONS, strict=False):
        assert re.fullmatch(expression, text), (text, expression)
    assert len(set(texts)) > NUM_SCHEMAS // 2


def test_neighbours_without_a_grammar_get_the_tokens_that_they_get_without_such_company(house):
    alone = house.serve(ROOMY, slice(-NUM_NEIGHBOURS, None))
    assert alone.token_ids == house.undisturbed.token_ids[-NUM_NEIGHBOURS:]


@pytest.mark.parametrize("recovery", Recovery)
def test_a_sequence_that_gives_way_goes_on_where_it_was(house, recovery):
    served = house.serve(replace(TIGHT, recovery=recovery, num_host_slots=64))
    assert served.num_preemptions > 0
    assert served.token_ids == house.undisturbed.token_ids


def test_a_sequence_goes_on_where_it_was_after_all_memory_was_lost(house):
    few = slice(NUM_SCHEMAS - 3, NUM_SCHEMAS + 5)
    served = house.serve(replace(ROOMY, lookahead=True, loses_each_request=True), few)
    assert served.token_ids == house.undisturbed.token_ids[few]


def test_drafts_change_no_token(house):
    texts = list(zip(house.prompts, house.undisturbed.token_ids, strict=True))
    served = house.serve(replace(TIGHT, num_draft_tokens=4), drafter=KnowingDrafter(texts))
    assert served.num_accepted > 0
    assert served.token_ids == house.undisturbed.token_ids


def test_samples_of_one_prompt_each_follow_it_for_themselves(house):
    which = slice(NUM_SCHEMAS, NUM_SCHEMAS + len(EXPRESSIONS))
    served = house.serve(replace(ROOMY, num_samples=3, lookahead=True), which)
    assert served.token_ids == house.undisturbed.token_ids[which]
    for samples, expression in zip(served.samples, EXPRESSIONS, strict=True):
        for token_ids in samples:
            text = house.codec.decode(token_ids, skip_special_tokens=True)
            assert re.fullmatch(expression, text), (text, expression)


@pytest.fixture(scope="module")
def embedded_folder():
    return embedded.prepare()


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "colours"],
    "additionalProperties": False,
}


@pytest.mark.model
@pytest.mark.slow
def test_the_embedded_model_answers_in_the_form_it_was_asked_for(embedded_folder):
    codec = TextCodec.load(embedded_folder)
    questions = [
        "Describe a person with a name, an age and colours.",
        "What is 6 times 7?",
        "Hello!",
    ]
    prompts = [
        codec.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
        for text in questions
    ]
    plain = SamplingParams(temperature=0.0, max_tokens=60)
    wishes = [
        replace(plain, grammar=Grammar(GrammarForm.JSON_SCHEMA, json.dumps(PERSON))),
        replace(plain, grammar=Grammar(GrammarForm.REGEX, r"The answer is [0-9]{1,3}\.")),
        plain,
    ]
    shape = replace(ROOMY, num_blocks=64, lookahead=True)

    def serve_all(wishes):
        runner = load_runner(str(embedded_folder), device="cpu", dtype="float32")
        served = serve(runner, prompts, wishes, shape)
        runner.close()
        return [codec.decode(ids, skip_special_tokens=True) for ids in served.token_ids]

    person, answer, hello = serve_all(wishes)
    jsonschema.validate(json.loads(person), PERSON)
    assert re.fullmatch(r"The answer is [0-9]{1,3}\.", answer)
    assert serve_all([plain] * 3)[2] == hello
