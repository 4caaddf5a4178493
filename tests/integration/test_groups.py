"""Several outputs of one prompt, through real processes: many samples, best_of, beam search."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from integration.system import System
from pageframe.client import BeamParams, EarlyStopping, GenerationRequest
from pageframe.core.errors import DeadlineError, InvalidRequestError
from pageframe.core.step import FinishReason

PROMPT = "the quick brown fox"


def run(system: System, **fields):
    fields = {"prompt": PROMPT, "max_tokens": 16, "ignore_eos": True} | fields
    return system.complete(GenerationRequest(**fields))


def test_a_search_finds_what_hugging_face_finds(llama_system: System) -> None:
    with llama_system.client() as client:
        token_ids = client.tokenize(PROMPT)
    model = AutoModelForCausalLM.from_pretrained(llama_system.model, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    params = BeamParams(
        num_beams=5, num_return=3, length_penalty=0.7, early_stopping=EarlyStopping.NEVER
    )
    generated = model.generate(
        torch.tensor([token_ids]),
        attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
        do_sample=False,
        num_beams=5,
        num_return_sequences=3,
        length_penalty=0.7,
        early_stopping="never",
        max_new_tokens=16,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    found = run(llama_system, beam_search=params)
    expected = generated.sequences[:, len(token_ids) :].tolist()
    assert [sample.token_ids for sample in found.samples] == expected
    scores = [sample.score for sample in found.samples]
    assert scores == pytest.approx(generated.sequences_scores.tolist(), rel=1e-4)
    account = found.samples[0].account
    assert account.num_copies_on_write > 0
    assert account.num_unreturned_tokens > 0


def test_best_of_returns_the_best_of_the_samples_that_n_returns(llama_system: System) -> None:
    drawn = run(llama_system, seed=5, temperature=1.0, num_samples=8, num_logprobs=0)
    means = [
        sum(entry.logprob for entry in sample.logprobs) / len(sample.logprobs)
        for sample in drawn.samples
    ]
    best = sorted(range(8), key=lambda index: -means[index])[:3]
    ranked = run(llama_system, seed=5, temperature=1.0, num_samples=3, best_of=8)
    expected = [drawn.samples[index] for index in best]
    assert [sample.token_ids for sample in ranked.samples] == [it.token_ids for it in expected]
    assert [sample.text for sample in ranked.samples] == [it.text for it in expected]
    scores = [sample.score for sample in ranked.samples]
    assert scores == pytest.approx([means[index] for index in best])
    assert [sample.account.num_unreturned_tokens for sample in ranked.samples] == [80, 0, 0]


def test_sixty_four_samples(llama_system: System) -> None:
    found = run(llama_system, seed=6, temperature=1.0, num_samples=64)
    assert len(found.samples) == 64
    few = run(llama_system, seed=6, temperature=1.0, num_samples=3)
    for sample, same in zip(few.samples, found.samples, strict=False):
        assert sample.token_ids == same.token_ids


def test_a_search_that_is_too_late_leaves_nothing_behind(slow_system: System) -> None:
    search = BeamParams(num_beams=4)
    request = GenerationRequest(prompt=PROMPT, max_tokens=400, beam_search=search)
    with slow_system.client() as client, pytest.raises(DeadlineError):
        client.complete(request, timeout_s=0.5)
    slow_system.settle()
    again = run(slow_system, max_tokens=5, beam_search=search)
    assert again.samples[0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"beam_search": BeamParams(num_beams=0)}, "NUM_BEAMS_OUT_OF_RANGE"),
        ({"beam_search": BeamParams(num_beams=65)}, "NUM_BEAMS_OUT_OF_RANGE"),
        ({"beam_search": BeamParams(num_beams=2), "num_samples": 2}, "BEAMS_WITH_FIELD"),
        ({"beam_search": BeamParams(num_beams=2), "stop": ("x",)}, "BEAMS_WITH_FIELD"),
        ({"beam_search": BeamParams(num_beams=2), "temperature": 0.5}, "BEAMS_WITH_SAMPLING"),
        ({"best_of": 65}, "BEST_OF_OUT_OF_RANGE"),
    ],
)
def test_what_makes_no_sense_is_refused(llama_system: System, fields, reason) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        run(llama_system, **fields)
    assert caught.value.reason == reason
