"""Recorded decode steps give the tokens of other steps, whatever the batch and its bucket."""

import itertools

import numpy as np
import pytest
import torch

from pageframe.core.errors import InternalError, ResourceExhaustedError
from pageframe.executor.batch import DraftSamples
from pageframe.executor.model import device_steps
from pageframe.executor.model.step_graphs import bucket_sizes
from pageframe.kernels.layouts import KvLayout
from unit.model.graph_house import BLOCK_SIZE, MOST, House

_NUM_BUCKETS = 4


@pytest.fixture(scope="module", autouse=True)
def _linear_layers_as_on_a_gpu():
    """Not packed for a CPU, but over the decoder's own scratch memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pageframe.executor.model.linear.can_pack", lambda _: False)
        yield


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return _with_sequences(House("llama", tmp_path_factory.mktemp("llama")))


def _with_sequences(house):
    """Five sequences: some greedy, some that draw, with and without filters."""
    filters = [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {}, {"top_k": 5}]
    random = np.random.default_rng(7)
    for row, each in enumerate(filters):
        tokens = random.integers(1, house.config.vocab_size, 1 + 3 * row)
        house.admit(row, tokens.tolist(), seed=int(random.integers(2**62)), **each)
    return house


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]),
        (2, [1, 2]),
        (5, [1, 2, 4, 5]),
        (64, [1, 2, 4, 8, 16, 24, 32, 48, 64]),
        (100, [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100]),
        (256, [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256]),
    ],
)
def test_buckets_are_powers_of_two_and_half_way_between_where_that_pays(most, sizes):
    assert bucket_sizes(most) == sizes


def test_the_largest_is_recorded_first_and_each_is_told(house):
    assert house.recorder.num_recorded == _NUM_BUCKETS
    assert [text for text, _ in house.told] == [
        f"recording decode graphs: {size} sequences ({number} of 4)"
        for number, size in enumerate((5, 4, 2, 1), 1)
    ]
    assert [fraction for _, fraction in house.told] == [0.0, 0.25, 0.5, 0.75]


def test_batches_of_changing_size_decode_as_they_do_step_by_step(house):
    _assert_decodes(house)


def test_layers_with_a_window_and_layers_without_decode_from_blocks_of_their_own(tmp_path):
    house = _with_sequences(House("qwen2", tmp_path))
    assert house.groups.windows == (0, 9, 9)
    _assert_decodes(house)


def _assert_decodes(house):
    seed = int(np.random.SeedSequence().entropy % 2**31)
    print(f"seed={seed}")
    random = np.random.default_rng(seed)
    num_replays = house.recorder.num_replays
    for size in (3, 5, 1):
        house.decode(random.permutation(MOST)[:size].tolist())
    assert house.recorder.num_replays == num_replays + 3
    assert house.recorder.num_recorded == _NUM_BUCKETS


def test_steps_that_are_not_all_decodes_go_their_own_way(house):
    num_replays = house.recorder.num_replays
    # Chunks, of one token, too.
    for end in (1, min(3, len(house.tokens[0]))):
        house.runner.execute(house.prompt(0, end))
    assert house.recorder.num_replays == num_replays
    graphs = house.steps._graphs
    assert graphs.takes(house.decodes([0, 1]))
    drafted = house.decodes([0, 1])
    drafted.drafts = DraftSamples(np.zeros(2, np.int32), np.full(2, -1, np.int32))
    assert not graphs.takes(drafted)
    forked = house.decodes([0, 1])
    forked.samples, forked.sample_rows = np.array([0, 1, 1], np.int32), np.arange(3, dtype=np.int32)
    assert not graphs.takes(forked)
    assert not graphs.takes(house.decodes([0, 1, 2, 3, 4, 0]))


def test_what_pads_a_batch_writes_nowhere(house):
    blocks = house.blocks
    before = blocks.clone()
    house.decode([0, 3, 4])
    written = (blocks != before).any(1).nonzero().squeeze(1).tolist()
    places = [(len(house.tokens[row]) - 2) // BLOCK_SIZE for row in (0, 3, 4)]
    owned = [
        house.tables[row].reshape(-1, house.num_groups)[place].tolist()
        for row, place in zip((0, 3, 4), places, strict=True)
    ]
    assert sorted(written) == sorted(itertools.chain(*owned))


def test_sequences_that_want_more_than_a_token_get_it_from_the_logits_of_the_graph(house):
    house.release(1)
    house.admit(1, [5, 6, 7], num_logprobs=2, presence_penalty=0.5)
    house.release(2)
    house.admit(2, [9, 8], min_tokens=1, stop_token_ids=(3,))
    num_replays = house.recorder.num_replays
    output = house.decode([0, 1, 2])
    assert list(output.logprobs) == [1]
    assert len(output.logprobs[1].top_token_ids) == 2
    assert house.recorder.num_replays == num_replays + 1
    for row in (1, 2):
        house.release(row)
        house.admit(row, [5, 6, 7])


def test_a_step_starts_from_tokens_that_only_the_device_knows(house):
    """Three steps one behind the other, none of which waits for the tokens of the one before."""
    rows = [4, 0, 2]
    runner, expected = house.runner, house.foresee(rows, 3)
    first = runner.launch(house.decodes(rows))
    second = runner.launch(house.decodes(rows, unknown=rows, ahead=1))
    found = [first.collect().token_ids.tolist()]
    # Not in the order of the step before, and beside one whose token is known.
    third = runner.launch(house.decodes([2, 1, 4], unknown=[2, 4], ahead=2))
    found.append(second.collect().token_ids.tolist())
    last = dict(zip([2, 1, 4], third.collect().token_ids.tolist(), strict=True))
    assert found == expected[:2]
    assert [last[4], last[2]] == [expected[2][0], expected[2][2]]


def test_a_step_that_is_no_graph_starts_from_them_too(house):
    expected = house.foresee([0, 1], 2)
    first = house.runner.launch(house.decodes([0, 1]))
    batch = house.decodes([0, 1], unknown=[0, 1], ahead=1)
    batch.num_decodes = 0
    second = house.runner.launch(batch)
    found = [flight.collect().token_ids.tolist() for flight in (first, second)]
    assert found == expected


def test_what_is_recorded_stays_where_it_was_however_large_other_steps_become(house):
    kept = house.steps._graphs._scratch
    addresses = {name: buffer.data_ptr() for name, buffer in kept.items()}
    house.runner.execute(house.prompt(4, 9))
    own = house.decoder.scratch._buffers
    assert own["hidden"].numel() > kept["hidden"].numel()
    assert {name: buffer.data_ptr() for name, buffer in kept.items()} == addresses
    assert not {buffer.data_ptr() for buffer in own.values()} & set(addresses.values())
    house.decode([0, 1])


def test_logits_that_are_not_finite_are_told_with_their_row(house):
    house.release(1)
    house.admit(1, [7, 8, 9])
    house.blocks[house.tables[1, 0]] = 255
    flight = house.runner.launch(house.decodes([2, 1]))
    # The step behind it was launched already, and reads within the embedding.
    behind = house.runner.launch(house.decodes([2, 1], unknown=[2, 1], ahead=1))
    with pytest.raises(InternalError, match=r"row 1$") as caught:
        flight.collect()
    assert caught.value.reason == "LOGITS_NOT_FINITE"
    with pytest.raises(InternalError):
        behind.collect()
    house.release(1)
    house.admit(1, [7, 8, 9])


@pytest.mark.parametrize("where", ["launch", "forward"])
def test_memory_that_runs_out_is_said_and_the_next_step_is_served(house, monkeypatch, where):
    target = house.steps._graphs if where == "launch" else house.decoder

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    batch = house.decodes([0]) if where == "launch" else house.prompt(0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(target, where, fail)
        with pytest.raises(ResourceExhaustedError, match=r"in a step: .* 2\.00 GiB;") as caught:
            house.runner.execute(batch)
    assert caught.value.reason == "DEVICE_OUT_OF_MEMORY"
    house.decode([0])


def test_memory_that_runs_out_at_the_start_is_said(house, monkeypatch):
    def fail(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(house.recorder, "record", fail)
    with pytest.raises(ResourceExhaustedError, match="in warm-up") as caught:
        house.runner.warm_up()
    assert caught.value.limits["max_step_tokens"] == "6"


def test_the_largest_step_is_tried_out_and_writes_nothing(house):
    arena = house.runner._pool.arena
    before = arena.blocks.clone()
    seen = []
    forward = house.decoder.forward

    class Watched:
        """Looks at what the decoder is asked."""

        def __getattr__(self, name):
            return getattr(house.decoder, name)

        def forward(self, kv, token_ids, positions, rows):
            seen.append((len(token_ids), positions.max().item(), len(rows)))
            return forward(kv, token_ids, positions, rows)

    steps = house.make_steps(house.sampler, has_graphs=False, max_model_len=5)
    steps._decoder = Watched()
    with torch.inference_mode():
        # More tokens than a sequence has: one whole prompt, and one that is not.
        steps.warm_up(house.runner._pool.kv, 8)
    assert seen == [(8, 4, MOST)]
    assert torch.equal(arena.blocks, before)


def test_steps_are_promised_memory_before_the_pool_takes_it(house):
    layout = house.runner._pool.arena.layout
    with_graphs, without = house.steps, house.make_steps(house.sampler, has_graphs=False)
    small, large = (without.step_bytes(layout, tokens) for tokens in (100, 1000))
    assert large - small == 2 * house.decoder.activation_bytes(900)
    # What the buffers of a step have come to.
    taken = sum(buffer.nbytes for buffer in house.decoder.scratch._buffers.values())
    assert taken <= without.step_bytes(layout, 64)
    assert with_graphs.step_bytes(layout, 100) > small + _NUM_BUCKETS * device_steps._GRAPH_BYTES


def test_a_pool_on_a_gpu_leaves_that_memory(house, monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(house.plain, "_device", device)
    monkeypatch.setattr(house.plain, "_pool", None)
    monkeypatch.setattr(house.plain, "_on_device", house.steps)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 40, 1 << 41))
    with pytest.raises(ResourceExhaustedError) as caught:
        house.plain.allocate_pool(1 << 40, BLOCK_SIZE)
    layout = KvLayout(
        num_layers=house.groups.num_layers_each,
        block_size=BLOCK_SIZE,
        num_kv_heads=house.config.num_kv_heads,
        head_dim=house.config.head_dim,
        dtype=torch.float32,
        is_quantised=False,
    )
    assert caught.value.limits["promised_bytes"] == str(house.steps.step_bytes(layout, 6))
