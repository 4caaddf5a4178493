"""Beam groups over the real memory, with literal ancestry and block counts."""

from collections import Counter

import numpy as np
import pytest

from bench.paper.ancestry import read_recordings, replay, write_recordings
from bench.paper.beams import BeamServer
from unit.bench.bench_house import make_cost, make_lengths

BLOCK_SIZE = 4


def make_recording(*steps: list[int]) -> np.ndarray:
    return np.array([steps], dtype=np.uint8)


def serve(recording, *pairs):
    server = BeamServer(recording, make_cost(1 << 20), block_size=BLOCK_SIZE, seed=0)
    return server.serve(make_lengths(*pairs)).columns


def counted_by_hand(recording, num_prompt_tokens: int, num_output_tokens: int):
    """Blocks held and copied in every step of one search that is its recording's first.

    A beam is a list of block names, a block lives as long as somebody lists it.
    """
    width = recording.shape[2]
    names = iter(range(1_000_000))
    steps = iter(recording[0].tolist())
    beams = [[next(names) for _ in range(-(-num_prompt_tokens // BLOCK_SIZE))]]
    held, copies = [len(beams[0])], [0]
    for step in range(1, num_output_tokens):
        parents = [0] * width if step == 1 else next(steps)
        beams = [list(beams[parent]) for parent in parents]
        position = num_prompt_tokens + step - 1
        num_copies = 0
        if position % BLOCK_SIZE == 0:
            for beam in beams:
                beam.append(next(names))
        else:
            owners = Counter(beam[-1] for beam in beams)
            for beam in beams:
                if owners[beam[-1]] > 1:
                    owners[beam[-1]] -= 1
                    beam[-1] = next(names)
                    num_copies += 1
        held.append(len({block for beam in beams for block in beam}))
        copies.append(num_copies)
    return held, copies


def test_a_group_shares_its_prompt_and_copies_the_last_block_for_all_but_one():
    # Six tokens: one full block, which stays shared, and two tokens in another.
    columns = serve(make_recording([0, 1, 2]), (6, 3))
    assert columns["num_running"].tolist() == [1, 3, 3]
    assert columns["num_blocks"].tolist() == [2, 4, 4]
    assert columns["num_blocks_unshared"].tolist() == [2, 6, 6]
    assert columns["num_copies"].tolist() == [0, 2, 0]


def test_a_beam_that_nobody_continues_gives_its_blocks_back():
    # Both beams have a block of their own, until one of them takes over both places.
    columns = serve(make_recording([0, 1], [0, 1], [1, 1], [0, 1]), (3, 6))
    assert columns["num_blocks"].tolist() == [1, 2, 4, 4, 3, 3]
    assert columns["num_copies"].tolist() == [0, 1, 0, 0, 1, 0]
    assert columns["num_forks"].tolist() == [0, 1, 0, 0, 1, 0]


def test_one_token_needs_no_beams():
    columns = serve(make_recording([0, 1]), (6, 1))
    assert columns["num_running"].tolist() == [1]


@pytest.mark.parametrize("width", [2, 4, 6])
def test_blocks_and_copies_are_those_counted_by_hand(width):
    recording = read_recordings()[width][:1]
    num_steps = recording.shape[1]
    columns = serve(recording, (9, num_steps))
    held, copies = counted_by_hand(recording, 9, num_steps)
    assert columns["num_blocks"].tolist() == held
    assert columns["num_copies"].tolist() == copies


def test_more_requests_than_run_at_once_are_all_served():
    columns = serve(make_recording([1, 1], [0, 0], [1, 0]), *[(5, 7)] * 20)
    assert columns["num_running"].sum() == 20 * (1 + 6 * 2)


def test_recordings_survive_a_round_trip(tmp_path):
    path = tmp_path / "folder" / "ancestry.npz"
    recordings = {4: make_recording([0, 1, 2, 3], [3, 3, 3, 0]), 2: make_recording([1, 0])}
    write_recordings(path, recordings)
    found = read_recordings(path)
    assert list(found) == [2, 4]
    for width, parents in recordings.items():
        np.testing.assert_array_equal(found[width], parents)


def test_a_replay_goes_on_with_another_search():
    recording = np.array([[[0, 0], [0, 1]], [[1, 1], [1, 0]]], dtype=np.uint8)
    steps = replay(recording, np.random.default_rng(0))
    searches = [[next(steps), next(steps)] for _ in range(4)]
    assert sorted(searches[:2]) == sorted(searches[2:]) == recording.tolist()


def test_what_was_recorded_names_beams_that_exist():
    for width, parents in read_recordings().items():
        assert parents.shape[2] == width
        assert parents.max() < width
