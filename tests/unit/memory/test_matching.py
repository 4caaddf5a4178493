"""What an admission finds of a sequence, and what it does with it."""

import pytest

from pageframe.core.plan import Recovery
from pageframe.core.replica import PoolAccount, TenantQuota
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import RefusedBecause
from unit.executor.small_engine import LONG, ONE_TOKEN, SmallEngine, alone, fork, request
from unit.memory.memories import entries

EIGHT = list(range(10, 18))
TEN = list(range(10, 20))


def test_a_prompt_sent_again_shares_its_full_blocks_and_computes_the_rest():
    small = SmallEngine()
    small.cache(TEN)
    result = small.start(request(1, TEN))
    assert (result.announced_ids, result.num_cached_tokens) == ([1], [8])
    assert (result.first_positions, result.num_computed) == ([8], [10])
    assert small.table(1) == [0, 1, 2]
    assert small.sink.brief() == [
        ("SHARE", "PREFIX_HIT", (0, 1)),
        ("ALLOCATE", "PREFILL", (2,)),
    ]
    assert small.output(1) == alone(TEN, 1)


def test_a_hit_covers_at_most_all_tokens_but_one_and_the_writer_copies_the_block():
    small = SmallEngine()
    small.cache(EIGHT)
    result = small.start(request(1, EIGHT))
    assert (result.num_cached_tokens, result.first_positions) == ([7], [7])
    assert small.table(1) == [0, 2]
    # The copy is made even by the only user: the original stays what the index says it is.
    assert small.sink.brief() == [
        ("SHARE", "PREFIX_HIT", (0, 1)),
        ("ALLOCATE", "PREFILL", (2,)),
        ("COPY_ON_WRITE", "PREFILL", (1,)),
        ("RELEASE", "PREFILL", (1,)),
    ]
    assert small.cached_ids() == [1]
    assert small.output(1) == alone(EIGHT, 1)


def test_a_hit_may_end_inside_a_block():
    small = SmallEngine()
    small.cache(EIGHT)
    prompt = [*EIGHT[:6], 50, 51]
    result = small.start(request(1, prompt))
    assert (result.num_cached_tokens, result.first_positions) == ([6], [6])
    assert small.table(1) == [0, 2]
    assert small.output(1) == alone(prompt, 1)


def test_a_hit_inside_the_first_block_needs_no_full_block_before_it():
    small = SmallEngine()
    small.cache(EIGHT)
    result = small.start(request(1, [10, 11, 50]))
    assert (result.first_positions, small.table(1)) == ([2], [2])


def test_of_two_blocks_that_go_on_alike_the_one_that_agrees_longest_is_shared():
    small = SmallEngine()
    small.cache([10, 11, 12, 13, 20, 21, 30, 31], [10, 11, 12, 13, 20, 21, 22, 40])
    result = small.start(request(1, [10, 11, 12, 13, 20, 21, 22, 50]))
    assert result.first_positions == [7]


def test_blocks_of_one_token_are_never_copied():
    small = SmallEngine(block_size=1, num_blocks=12)
    small.cache(range(10, 15))
    result = small.start(request(1, range(10, 15)))
    assert (result.num_cached_tokens, result.first_positions) == ([4], [4])
    assert small.sink.brief() == [
        ("SHARE", "PREFIX_HIT", (0, 1, 2, 3)),
        ("ALLOCATE", "PREFILL", (5,)),
    ]


def test_a_prompt_of_one_token_finds_nothing_but_what_it_computes():
    small = SmallEngine(block_size=1)
    small.cache([10])
    result = small.start(request(1, [10]))
    assert (result.num_cached_tokens, result.first_positions) == ([0], [0])


def test_the_second_of_two_prompts_shares_once_the_first_has_written():
    small = SmallEngine()
    small.step(announce=[request(1, TEN), request(2, TEN)], may=entries((1, 0, 64)))
    result = small.step(may=entries((2, 0, 64)))
    assert result.first_positions == [8]
    assert small.table(2)[:2] == small.table(1)[:2] == [0, 1]


def test_log_probabilities_of_the_prompt_want_every_position_computed():
    small = SmallEngine()
    small.cache(TEN)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, num_prompt_logprobs=0)
    result = small.start(request(1, TEN, sampling=sampling))
    assert (result.num_cached_tokens, result.first_positions) == ([0], [0])


def test_once_they_are_told_a_preempted_sequence_may_use_hits():
    small = SmallEngine()
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, num_prompt_logprobs=0)
    small.start(request(1, TEN, sampling=sampling))
    small.preempt(1, Recovery.RECOMPUTE)
    assert small.resume(1).first_positions == [8]


def test_another_salt_never_hits_and_the_same_salt_does():
    """Two tenants: no cross hit, and a hit within each; one alone would prove nothing."""
    small = SmallEngine()
    small.cache(TEN, cache_salt=b"alice's", tenant="alice")
    result = small.start(request(1, TEN, cache_salt=b"bob's", tenant="bob"))
    assert (result.num_cached_tokens, result.first_positions) == ([0], [0])
    result = small.start(request(2, TEN, cache_salt=b"alice's", tenant="alice"))
    assert (result.num_cached_tokens, result.first_positions) == ([8], [8])


def test_nothing_is_found_inside_a_block_of_another_salt():
    small = SmallEngine()
    small.cache(EIGHT, cache_salt=b"a")
    assert small.start(request(1, [10, 11, 50], cache_salt=b"b")).first_positions == [0]


def test_tenants_that_were_joined_under_one_salt_share():
    small = SmallEngine()
    small.cache(TEN, cache_salt=b"joined", tenant="alice")
    result = small.start(request(1, TEN, cache_salt=b"joined", tenant="bob"))
    assert result.first_positions == [8]
    held = {name: count for name, count in small.memory.num_held_by_tenant().items() if count}
    # Cached blocks belong to nobody, so whoever takes them up is charged.
    assert held == {"bob": 3}


def test_a_chain_is_evicted_from_its_tail_and_found_as_far_as_it_is_left():
    small = SmallEngine(num_blocks=4)
    small.cache(range(10, 22))
    assert small.cached_ids() == [2, 1, 0]
    small.cache([50, 51, 52, 53, 54])
    assert small.cached_ids() == [1, 0, 2]
    assert small.start(request(1, range(10, 22))).num_cached_tokens == [8]


def test_the_chain_that_was_used_longest_ago_goes_first():
    small = SmallEngine(num_blocks=4)
    small.cache(range(10, 15), range(20, 25), range(10, 15))
    assert small.cached_ids() == [1, 0]
    small.cache(range(30, 39))
    assert small.start(request(1, range(10, 15))).num_cached_tokens == [4]


def test_a_key_whose_block_was_evicted_is_not_hit_again():
    """A phantom hit: the key is still known when the block has another owner already."""
    small = SmallEngine(num_blocks=2)
    small.cache(EIGHT)
    small.start(request(1, range(40, 47)))
    assert small.table(1) == [0, 1]
    small.engine.cancel([1])
    result = small.start(request(2, EIGHT))
    assert (result.num_cached_tokens, result.first_positions) == ([0], [0])
    assert small.output(2) == alone(EIGHT, 1)


def test_blocks_that_are_hit_and_blocks_that_are_free_are_counted_once_each():
    """Cached blocks counted as room for new ones and as hits at once: one block too many."""
    small = SmallEngine(num_blocks=4)
    small.cache(EIGHT)
    assert small.engine.account() == PoolAccount(total=4, free=2, cached=2)
    result = small.start(request(1, [*EIGHT, *range(30, 39)]))
    # Five blocks: two hits, three new ones, of which two are free and none can be evicted.
    assert result.refused_because == [RefusedBecause.POOL_FULL]
    assert small.engine.account() == PoolAccount(total=4, free=2, cached=2)
    result = small.step(may=entries((1, 0, 8)))
    assert result.refused_ids == []
    assert small.table(1) == [0, 1, 2, 3]


def test_what_is_hit_is_never_evicted_to_make_room_for_the_rest():
    small = SmallEngine(num_blocks=4)
    small.cache(EIGHT, range(40, 45))
    result = small.start(request(1, [*EIGHT, *range(30, 37)]))
    assert result.first_positions == [8]
    assert small.table(1)[:2] == [0, 1]
    assert [it for it in small.sink.brief() if it[0] == "EVICT"] == [
        ("EVICT", "POOL_PRESSURE", (2,))
    ]


def test_hits_on_blocks_that_somebody_holds_take_no_room():
    small = SmallEngine(num_blocks=4)
    small.start(request(1, [*EIGHT, 18]))
    result = small.start(request(2, [*EIGHT, 30]))
    assert (result.refused_ids, small.table(2)) == ([], [0, 1, 3])
    assert small.engine.account() == PoolAccount(total=4, held=4)


def test_a_prompt_that_is_here_as_a_whole_is_let_in_though_it_fills_the_pool():
    """A request that fits the pool alone must not wait for ever, least of all for its own hits.

    All three blocks are hits, and the copy of the last would be a fourth: then fewer are shared.
    """
    small = SmallEngine(num_blocks=3)
    prompt = list(range(10, 22))
    small.cache(prompt)
    result = small.start(request(1, prompt, sampling=ONE_TOKEN))
    assert result.refused_ids == []
    assert small.output(1) == alone(prompt, 1)


def test_a_prompt_that_is_here_as_a_whole_is_let_in_though_it_fills_the_quota():
    """The same for a ceiling that leaves just enough room for the request alone."""
    small = SmallEngine()
    prompt = list(range(10, 22))
    small.cache(prompt, tenant="t")
    small.desk.set_quota(TenantQuota(tenant="t", ceiling_blocks=3))
    result = small.start(request(1, prompt, tenant="t", sampling=ONE_TOKEN))
    assert result.refused_ids == []
    assert small.output(1) == alone(prompt, 1)


def test_nothing_is_found_inside_a_block_by_what_a_child_of_a_fork_wrote():
    small = SmallEngine()
    small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
    small.step()
    small.step()
    small.engine.cancel([1, 2])
    prompt = [*TEN, *alone(TEN, 2, 1), 3, 4]
    result = small.start(request(3, prompt))
    # Blocks 2 and 3 hold what each of the two went on with; only the child's agrees here.
    assert result.first_positions == [12]
    assert small.output(3) == alone(prompt, 1)


def test_what_was_computed_before_the_first_run_is_told_once():
    small = SmallEngine()
    small.cache(TEN)
    small.start(request(1, TEN))
    small.preempt(1, Recovery.RECOMPUTE)
    small.resume(1)
    account = small.engine.cancel([1]).accounts[1]
    assert (account.num_cached_tokens, account.num_preemptions) == (8, 1)
    assert account.num_blocks_shared == 4


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 7, 8, 9, 11, 12])
@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
def test_hits_never_change_a_token(block_size, num_tokens):
    """Arithmetic of pages against tokens: every length around a boundary, at several sizes."""
    small = SmallEngine(block_size=block_size, num_blocks=40)
    prompt = list(range(10, 10 + num_tokens))
    small.cache(prompt, [*prompt[:-1], 60])
    small.start(request(1, prompt))
    for _ in range(4):
        small.step()
    assert small.output(1) == alone(prompt, 5)
    assert LONG.ignore_eos
