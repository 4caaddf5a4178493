"""Frames of the pool: a viewer at any distance behind ends where the others are."""

import random

import pytest

from pageframe.core.trace import KvOperation
from pageframe.gateway.http import pool_frames
from pageframe.gateway.http.pool_frames import NUM_VERSIONS_KEPT, PoolFrames
from pageframe.gateway.http.pool_mirror import PoolMirror
from pageframe.gateway.http.pool_stalls import StallSample
from pageframe.rpc.auth import Caller
from pageframe.wire.memory_facts import StepFacts
from unit.gateway.http.played_memory import Screen
from unit.gateway.http.test_pool_page_mirror import OPERATOR, batch, snapshot_of, table


def frames_of(mirror, caller=OPERATOR):
    frames = PoolFrames(caller)
    frames.begin(mirror)
    return frames


def step(number):
    return StepFacts(number, 1_000_000 * number, 2_500_000, 3, 17, 4)


def see(frames, screen):
    screen.take(frames.since(screen.version))


def test_before_the_executor_answers_there_is_no_pool():
    screen, frames = Screen(), PoolFrames(OPERATOR)
    frames.publish()
    see(frames, screen)
    assert screen.columns == {}
    assert screen.away == "the executor has not answered yet"


def test_the_first_frame_is_everything():
    screen = Screen()
    mirror = PoolMirror(OPERATOR, snapshot_of(table(1, 0, 1), table(2, 1)))
    see(frames_of(mirror), screen)
    assert screen.kinds() == ["held", "shared", "free", "free", "free", "free"]
    assert screen.holders == {1: (1, 2)}
    assert screen.names[2] == ("red", "r2", 2)
    assert (screen.last["num_blocks"], screen.last["block_size"]) == (6, 16)
    assert screen.last["operations"][2] == "kv.share"
    assert screen.last["causes"][2] == "decode"
    assert screen.away == ""


def test_what_follows_is_what_has_changed():
    screen = Screen()
    mirror = PoolMirror(OPERATOR, snapshot_of(table(1, 0, 1), table(2, 1)))
    frames = frames_of(mirror)
    see(frames, screen)
    mirror.take(batch((KvOperation.RELEASE, 2, [1]), (KvOperation.ALLOCATE, 2, [4])), 7_000_000)
    frames.publish(steps=[step(5)])
    see(frames, screen)
    assert screen.num_whole == 1
    assert screen.kinds() == ["held", "held", "free", "free", "held", "free"]
    assert screen.holders == {}
    assert screen.columns["holder"].tolist() == [1, 1, -1, -1, 2, -1]
    assert screen.columns["seen"].tolist() == [0, 7, 0, 0, 7, 0]
    assert screen.steps == [[5, 5.0, 2.5, 3, 17, 4]]


def test_a_frame_is_as_of_an_operation_whose_blocks_it_has():
    screen = Screen()
    mirror = PoolMirror(OPERATOR, snapshot_of(table(1, 0)))
    frames = frames_of(mirror)
    see(frames, screen)
    mirror.take(batch((KvOperation.ALLOCATE, 1, [4]), first=11), 0)
    frames.publish()
    # Heard of after the version was made, and before it is taken: a part of the next one.
    mirror.take(batch((KvOperation.ALLOCATE, 1, [5]), first=12), 0)
    see(frames, screen)
    assert (screen.last["operation"], screen.kinds()[4:]) == (11, ["held", "free"])
    frames.publish()
    see(frames, screen)
    assert (screen.last["operation"], screen.kinds()[4:]) == (12, ["held", "held"])


def test_the_same_frame_is_encoded_once(monkeypatch):
    encoded = []
    encode = pool_frames.encode_json
    monkeypatch.setattr(pool_frames, "encode_json", lambda it: (encoded.append(it), encode(it))[1])
    mirror = PoolMirror(OPERATOR, snapshot_of(table(1, 0)))
    frames = frames_of(mirror)
    frames.publish()
    assert frames.since(1) is frames.since(1)
    assert frames.since(0) is frames.since(0)
    assert len(encoded) == 2
    frames.publish()
    frames.since(2)
    assert len(encoded) == 3


def test_who_is_too_far_behind_gets_everything_and_that_is_counted():
    mirror = PoolMirror(OPERATOR, snapshot_of(table(1, 0)))
    frames, slow, slower = frames_of(mirror), Screen(), Screen()
    see(frames, slow)
    see(frames, slower)
    for _ in range(NUM_VERSIONS_KEPT):
        frames.publish()
    see(frames, slow)
    assert (slow.num_whole, frames.num_resets) == (1, 0)
    frames.publish()
    see(frames, slower)
    assert (slower.num_whole, frames.num_resets) == (2, 1)


def test_a_new_mirror_is_everything_for_everybody():
    screen = Screen()
    frames = frames_of(PoolMirror(OPERATOR, snapshot_of(table(1, 0))))
    frames.publish()
    see(frames, screen)
    frames.lose("nobody answers")
    see(frames, screen)
    assert (screen.num_whole, screen.away) == (1, "nobody answers")
    frames.begin(PoolMirror(OPERATOR, snapshot_of(table(2, 3), num_blocks=9)))
    see(frames, screen)
    assert (screen.num_whole, screen.away, len(screen.columns["kind"])) == (2, "", 9)
    assert set(screen.names) == {2}
    assert frames.num_resets == 0, "that was not the viewer's doing"


def test_totals_of_all_tenants_are_for_operators():
    sample = StallSample(3_000_000, 1.5, {"queue": 0.25})
    for caller, expected in ((OPERATOR, [[3, 1500.0, {"queue": 250.0}]]), (Caller("red"), [])):
        screen, frames = Screen(), frames_of(PoolMirror(caller, snapshot_of()), caller)
        see(frames, screen)
        frames.publish(samples=[sample])
        see(frames, screen)
        assert screen.samples == expected


def test_a_name_that_comes_later_is_told_to_who_has_the_block_already():
    mirror = PoolMirror(OPERATOR, snapshot_of(table(1, 0)))
    frames, screen = frames_of(mirror), Screen()
    mirror.take(batch((KvOperation.ALLOCATE, 9, [4])), 0)
    frames.publish()
    see(frames, screen)
    assert 9 not in screen.names
    mirror.learn(snapshot_of(table(1, 0), table(9, 4, tenant="blue")))
    frames.publish()
    see(frames, screen)
    assert screen.names[9] == ("blue", "r9", 9)
    assert screen.num_whole == 1


@pytest.mark.parametrize("seed", range(4))
def test_viewers_of_every_speed_see_the_same_in_the_end(seed):
    print(f"seed {seed}")
    source = random.Random(seed)
    mirror = PoolMirror(OPERATOR, snapshot_of(num_blocks=40))
    frames, screens = frames_of(mirror), [Screen() for _ in range(5)]
    held, number = {}, 10
    for _ in range(300):
        for _ in range(source.randint(0, 4)):
            block_id, number = source.randrange(40), number + 1
            operation = KvOperation.ALLOCATE
            if block_id in held:
                operation = source.choice([KvOperation.SHARE, KvOperation.RELEASE])
            if operation is KvOperation.RELEASE:
                sequence_id = held[block_id].pop()
            else:
                sequence_id = source.randint(1, 5)
                held.setdefault(block_id, []).append(sequence_id)
            mirror.take(batch((operation, sequence_id, [block_id]), first=number), 0)
            if not held[block_id]:
                del held[block_id]
                number += 1
                mirror.take(batch((KvOperation.FREE, 0, [block_id]), first=number), 0)
        frames.publish(steps=[step(number)])
        for speed, screen in enumerate(screens):
            if source.random() < 0.5**speed:
                see(frames, screen)
    frames.publish()
    fresh = Screen()
    see(frames, fresh)
    for screen in screens:
        see(frames, screen)
        assert {k: v.tolist() for k, v in screen.columns.items()} == {
            k: v.tolist() for k, v in fresh.columns.items()
        }
        assert screen.holders == fresh.holders
        assert {it: len(owners) for it, owners in held.items() if len(owners) > 1} == {
            it: len(owners) for it, owners in screen.holders.items()
        }
