"""Chats longer than the pool together: all finish, exactly, and come back by promotion.

The benchmark ``bench.long_context`` at a 16th of its length; what took how long is not looked at.
"""

import pytest

from bench.long_context.chats import Shape, ask_hugging_face, build_model
from bench.long_context.study import measure, summarise

SHAPE = Shape(
    num_context_tokens=2048,
    num_turn_tokens=40,
    num_new_tokens=8,
    num_chats=8,
    chunk_tokens=256,
    block_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("long-context")
    build_model(SHAPE, path)
    return path


@pytest.fixture(scope="module")
def answers(folder):
    """Of the roomy run and of the tiered one."""
    return measure(SHAPE, folder)


def test_eight_chats_on_a_pool_for_two_equal_those_in_a_pool_for_all(answers):
    roomy, tiered = answers
    report = summarise(roomy, tiered)
    assert report["tokens_equal"]
    assert report["logprob_error_max"] < 1e-4
    told = [tuple(turn.token_ids) for turn in tiered.first + tiered.second]
    assert len(set(told)) == 16
    assert {len(token_ids) for token_ids in told} == {SHAPE.num_new_tokens}
    num_second_prompt = SHAPE.num_context_tokens - SHAPE.num_new_tokens
    assert [turn.num_computed for turn in roomy.second] == [num_second_prompt] * 8
    # Of a second turn all whole blocks of the first come back; what it adds has to be computed.
    num_first_computed = SHAPE.num_first_tokens + SHAPE.num_new_tokens - 1
    num_blocks_kept = num_first_computed // SHAPE.block_size
    num_left = num_second_prompt - num_blocks_kept * SHAPE.block_size
    assert [turn.num_computed for turn in tiered.second] == [num_left] * 8
    assert tiered.second_moves["PROMOTE"] == 8 * num_blocks_kept
    assert "PROMOTE" not in roomy.second_moves


def test_the_first_chat_equals_hugging_face(folder, answers):
    _, tiered = answers
    told = [tiered.first[0].token_ids, tiered.second[0].token_ids]
    assert told == ask_hugging_face(SHAPE, folder)
