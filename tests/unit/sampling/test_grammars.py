"""Only what its grammar allows is chosen for a row, and for other rows nothing changes."""

import re

import numpy as np
import pytest
import torch

from pageframe.core.errors import InvalidRequestError
from pageframe.core.sampling import SamplingParams
from pageframe.executor.batch import DraftSamples
from pageframe.executor.model.grammar_masks import GrammarMasks, follow, hold_back
from pageframe.executor.model.grammar_store import GrammarStore
from pageframe.executor.model.sampler import Sampler
from unit.sampling.tiny_vocabulary import (
    AB,
    COMMA,
    END,
    ONE,
    STOP,
    TOKENS,
    TWELVE,
    TWO,
    VOCAB_SIZE,
    A,
    B,
    regex,
    schema,
    vocabulary,
)

PROMPT = [COMMA, COMMA]
WORDS = regex("(ab|b)+12?")


@pytest.fixture
def store():
    store = GrammarStore(vocabulary())
    yield store
    store.close()


@pytest.fixture
def sampler(store):
    return make_sampler(store)


def make_sampler(store, num_rows=16):
    return Sampler(VOCAB_SIZE, num_rows, (END,), grammars=store)


def greedy(grammar=None, **changes):
    changes = {"temperature": 0.0, "max_tokens": 100} | changes
    return SamplingParams(grammar=grammar, **changes)


def admit(sampler, row, params, output=(), sample_index=0):
    sampler.admit(
        row,
        sampling=params,
        sample_index=sample_index,
        token_ids=np.array([*PROMPT, *output], dtype=np.int32),
        num_prompt_tokens=len(PROMPT),
    )


def choose(sampler, rows, logits, num_before):
    """One token for each row, whose outputs have ``num_before`` tokens."""
    positions = np.array(num_before, dtype=np.int32) + len(PROMPT)
    token_ids, _ = sampler.sample(logits, np.array(rows, np.int32), positions)
    return token_ids.tolist()


def preferring(*token_ids):
    """Logits of one row that like these tokens best, the first most."""
    logits = torch.zeros(1, VOCAB_SIZE)
    for rank, token_id in enumerate(token_ids):
        logits[0, token_id] = 100.0 - rank
    return logits


def run_alone(store, params, logits, num_tokens, sample_index=0):
    """Tokens of one sequence by itself, to its end; ``logits`` is [n, V]."""
    sampler = make_sampler(store, 1)
    admit(sampler, 0, params, sample_index=sample_index)
    output = []
    while len(output) < num_tokens and END not in output:
        output += choose(sampler, [0], logits[len(output)][None], [len(output)])
    return output


def text_of(token_ids):
    return b"".join(TOKENS[token_id] for token_id in token_ids if token_id != END).decode()


def test_the_best_token_that_the_grammar_allows_is_chosen(sampler):
    admit(sampler, 0, greedy(WORDS))
    liked = preferring(TWO, ONE, A, AB, TWELVE)
    assert choose(sampler, [0], liked, [0]) == [A]
    assert choose(sampler, [0], liked, [1]) == [B]
    assert choose(sampler, [0], liked, [2]) == [ONE]
    assert choose(sampler, [0], liked, [3]) == [TWO]


def test_behind_a_complete_output_only_the_end_may_come(sampler):
    admit(sampler, 0, greedy(regex("12")))
    assert choose(sampler, [0], preferring(A, TWELVE, ONE), [0]) == [TWELVE]
    assert choose(sampler, [0], preferring(A, B, TWELVE), [1]) == [END]


def test_an_output_may_end_where_it_may_go_on(sampler):
    admit(sampler, 0, greedy(regex("1(2)?")))
    choose(sampler, [0], preferring(ONE), [0])
    assert choose(sampler, [0], preferring(A, END, TWO), [1]) == [END]


def test_a_json_schema_is_followed(store):
    grammar = schema('{"type": "object", "properties": {"a": {"enum": [1, 12]}}, "required": ["a"],'
                     ' "additionalProperties": false}')  # fmt: skip
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(rng.normal(size=(60, VOCAB_SIZE)).astype(np.float32))
    logits[:, END] = 9.0
    assert re.fullmatch(
        r'\{ *"a" *: *(1|12) *\}', text_of(run_alone(store, greedy(grammar), logits, 60))
    )


def test_rows_without_a_grammar_choose_as_they_would_alone(store):
    rng = np.random.default_rng(11)
    params = [
        SamplingParams(temperature=1.0, seed=int(row), top_k=int(rng.integers(6)), max_tokens=50)
        for row in range(6)
    ]
    logits = torch.from_numpy(rng.normal(size=(8, 6, VOCAB_SIZE)).astype(np.float32))
    alone, mixed = make_sampler(store), make_sampler(store)
    for row, param in enumerate(params):
        admit(alone, row, param)
        admit(mixed, row, param)
    admit(mixed, 6, greedy(regex("[ab]+")))
    for step in range(8):
        expected = choose(alone, range(6), logits[step], [step] * 6)
        rows = [0, 1, 6, 2, 3, 4, 5]
        liked = torch.cat([logits[step][:2], preferring(A), logits[step][2:]])
        found = choose(mixed, rows, liked, [step] * 7)
        assert found == [*expected[:2], A, *expected[2:]]


@pytest.mark.parametrize("seed", range(12))
def test_what_is_drawn_is_what_the_same_row_draws_in_company_and_after_a_preemption(store, seed):
    """State is a function of the output: a row that comes back goes on as if it had stayed."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)

    def pick(*values):
        return values[rng.integers(len(values))]

    expressions = ["(ab|b)+12?", "[ab]{3,9}", '(\\{"a":1\\},?){1,4}', "a*b*1*2*", "(1|12|2){2,8}b?"]
    num_steps = 24
    params = [
        SamplingParams(
            temperature=pick(0.0, 0.8, 1.5),
            top_k=pick(0, 1, 3, 12),
            top_p=pick(1.0, 0.6),
            min_p=pick(0.0, 0.1),
            repetition_penalty=pick(1.0, 1.4),
            frequency_penalty=pick(0.0, 0.5),
            logit_bias=pick({}, {END: 4.0}, {A: -50.0}),
            stop_token_ids=pick((), (STOP,)),
            min_tokens=pick(0, 5),
            max_tokens=100,
            seed=int(rng.integers(2**63)),
            grammar=pick(None, *map(regex, expressions)),
        )
        for _ in range(10)
    ]
    logits = torch.from_numpy(rng.normal(size=(10, num_steps, VOCAB_SIZE)).astype(np.float32) * 3)
    expected = [
        run_alone(store, param, logits[row], num_steps, row) for row, param in enumerate(params)
    ]
    sampler = make_sampler(store)
    outputs = [[] for _ in params]
    for row, param in enumerate(params):
        admit(sampler, row, param, sample_index=row)
    while living := [row for row, output in enumerate(outputs) if len(output) < len(expected[row])]:
        victim = int(rng.choice(living))
        sampler.release(victim)
        admit(sampler, victim, params[victim], outputs[victim], victim)
        lengths = [len(outputs[row]) for row in living]
        liked = torch.stack([logits[row, len(outputs[row])] for row in living])
        for row, token_id in zip(living, choose(sampler, living, liked, lengths), strict=True):
            outputs[row].append(token_id)
    assert outputs == expected
    for param, output in zip(params, outputs, strict=True):
        if param.grammar is not None and output[-1] == END:
            assert re.fullmatch(param.grammar.text, text_of(output)), (param, output)
    assert sampler.failures() == {}


@pytest.mark.parametrize("seed", range(6))
def test_behind_drafts_comes_what_comes_one_by_one(store, seed):
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    params = greedy(WORDS, temperature=1.0, seed=seed)
    logits = torch.from_numpy(rng.normal(size=(30, VOCAB_SIZE)).astype(np.float32))
    expected = run_alone(store, params, logits, 30)
    sampler = make_sampler(store)
    admit(sampler, 0, params)
    output = []
    while len(output) < len(expected):
        guess = expected[len(output) : len(output) + int(rng.integers(4))]
        if guess and rng.integers(2):
            # A guess that is wrong, and leads out of the grammar at that.
            guess[int(rng.integers(len(guess)))] = COMMA
        num = len(guess) + 1
        drafts = DraftSamples(
            np.arange(num - 1, -1, -1, dtype=np.int32), np.array([*guess, -1], np.int32)
        )
        positions = np.arange(num, dtype=np.int32) + len(PROMPT) + len(output)
        places = [min(len(output) + place, len(logits) - 1) for place in range(num)]
        found, _ = sampler.sample(logits[places], np.zeros(num, np.int32), positions, drafts)
        num_right = next((i for i, token in enumerate(guess) if found[i] != token), len(guess))
        output += found[: num_right + 1].tolist()
    # Behind the end nothing counts.
    assert output[: len(expected)] == expected


def test_min_tokens_hold_the_end_back_as_long_as_something_else_is_left(sampler):
    admit(sampler, 0, greedy(regex("a(b)?"), min_tokens=3))
    assert choose(sampler, [0], preferring(A), [0]) == [A]
    assert choose(sampler, [0], preferring(END), [1]) == [B]
    assert choose(sampler, [0], preferring(A), [2]) == [END]


def test_stop_tokens_are_not_part_of_a_grammar_unless_they_are_written_in_it(sampler):
    admit(sampler, 0, greedy(regex("[a1]*"), stop_token_ids=(STOP, ONE), min_tokens=1))
    assert choose(sampler, [0], preferring(STOP, ONE, A), [0]) == [A]
    assert choose(sampler, [0], preferring(STOP, ONE, A), [1]) == [ONE]


def test_a_bias_chooses_among_what_is_allowed_and_brings_nothing_back(sampler):
    bias = {COMMA: 100.0, TWELVE: 50.0}
    admit(sampler, 0, greedy(regex("a|1|12"), logit_bias=bias))
    assert choose(sampler, [0], preferring(), [0]) == [TWELVE]


def test_log_probabilities_are_those_of_the_model(sampler):
    admit(sampler, 0, greedy(regex("1"), num_logprobs=2))
    logits = torch.randn(1, VOCAB_SIZE)
    positions = np.array([len(PROMPT)], np.int32)
    token_ids, logprobs = sampler.sample(logits, np.zeros(1, np.int32), positions)
    assert token_ids.tolist() == [ONE]
    expected = logits.log_softmax(1)[0]
    assert logprobs[0].logprob == pytest.approx(float(expected[ONE]))
    assert logprobs[0].top_token_ids == expected.topk(2).indices.tolist()


def test_output_that_does_not_follow_its_grammar_is_refused(sampler):
    with pytest.raises(InvalidRequestError, match="token 1 of 2") as caught:
        admit(sampler, 0, greedy(WORDS), [B, TWO])
    assert caught.value.reason == "GRAMMAR_MISMATCH"
    sampler.release(0)
    admit(sampler, 0, greedy(WORDS), [B, ONE])
    assert choose(sampler, [0], preferring(A, TWO), [2]) == [TWO]


def test_a_row_that_cannot_go_on_ends_and_the_others_do_not(sampler):
    # To tell how far back an "a" was in each of twenty places takes more states than are allowed.
    admit(sampler, 0, greedy(regex("(.*a.{400}){20}b")))
    admit(sampler, 1, greedy(WORDS))
    rng = np.random.default_rng(3)
    for step in range(2000):
        liked = torch.cat([preferring(*rng.permutation([A, B, AB])), preferring(B)])
        found = choose(sampler, [0, 1], liked, [step, step])
        assert found[1] == B
        if sampler.failures():
            break
    assert sampler.failures() == {0: "GRAMMAR_TOO_COMPLEX"}
    assert found[0] == END
    sampler.release(0)
    assert sampler.failures() == {}


def test_a_grammar_of_which_nothing_is_in_the_vocabulary_fails(sampler):
    admit(sampler, 0, greedy(regex("x")))
    assert choose(sampler, [0], preferring(A), [0]) == [END]
    assert sampler.failures() == {0: "GRAMMAR_INVALID"}


def test_masks_are_the_same_on_one_thread_and_on_several(store):
    masks = GrammarMasks(VOCAB_SIZE, (END,))
    prompt = np.array(PROMPT, np.int32)

    def states():
        return [follow(store, regex(f"a{{{n}}}b|[12]{{{n}}}"), prompt, 2) for n in range(1, 10)]

    together = masks.pack(states())
    alone = [masks.pack([state])[0] for state in states()]
    assert together.tolist() == [mask.tolist() for mask in alone]


def test_a_mask_holds_for_its_own_row_of_logits():
    masks = GrammarMasks(VOCAB_SIZE, (END,))
    packed = np.zeros((2, 4), np.uint8)
    packed[0, 0] = 1 << A
    packed[1, STOP // 8] = 1 << (STOP % 8)
    logits = torch.ones(3, VOCAB_SIZE)
    masks.forbid(logits, np.array([2, 0]), packed)
    assert torch.isfinite(logits).nonzero().tolist() == [
        [0, STOP], *([1, token] for token in range(VOCAB_SIZE)), [2, A],
    ]  # fmt: skip
    assert logits[torch.isfinite(logits)].eq(1.0).all()


def test_tokens_are_held_back_unless_nothing_else_is_left():
    mask = np.array([0b0000_0110, 0b1], np.uint8)
    hold_back(mask, np.array([1, 8]))
    assert mask.tolist() == [0b100, 0]
    hold_back(mask, np.array([2]))
    assert mask.tolist() == [0b100, 0]
