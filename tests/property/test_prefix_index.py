"""The prefix index against a plain dictionary: block to content, oldest first."""

from itertools import product, takewhile

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pageframe.executor.memory.block_keys import (
    BlockKey,
    chain_keys,
    chain_root,
    private_key,
    token_bytes,
)
from pageframe.executor.memory.prefix_index import (
    NO_BLOCK,
    NUM_CHILDREN_LOOKED_AT_MAX,
    PrefixIndex,
)

NUM_BLOCKS = 40
BLOCK_SIZE = 2
ROOTS = [chain_root(model="m", block_size=BLOCK_SIZE, salt=salt) for salt in (b"", b"a")]

# Of 25 different blocks below a parent not all are among the sixteen that are looked at.
block_ids = st.integers(0, NUM_BLOCKS - 1)
salts = st.integers(0, len(ROOTS) - 1)
held_tokens = st.tuples(st.integers(0, 4), st.integers(0, 4))
paths = st.lists(held_tokens, min_size=1, max_size=3).map(tuple)

Path = tuple[tuple[int, int], ...]
# A salt and the tokens of all blocks up to this one; or the numbers of a private key.
Content = tuple[int, Path] | tuple[int, int, int]


def array(token_ids: tuple[int, ...]) -> np.ndarray:
    return np.array(token_ids, dtype=np.int32)


def flat(path: Path) -> np.ndarray:
    return array(tuple(token_id for held in path for token_id in held))


def keys_of(salt: int, path: Path) -> list[BlockKey]:
    return chain_keys(ROOTS[salt], flat(path), BLOCK_SIZE)


def key_of(content: Content) -> BlockKey:
    return private_key(0, *content) if len(content) == 3 else keys_of(*content)[-1]


def parent_of(salt: int, path: Path) -> BlockKey:
    return keys_of(salt, path[:-1])[-1] if len(path) > 1 else ROOTS[salt]


def num_agreeing(held: tuple[int, ...], wanted: tuple[int, ...]) -> int:
    pairs = zip(held, wanted, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


class IndexMachine(RuleBasedStateMachine):
    """Add, remove, move and match in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(NUM_BLOCKS, BLOCK_SIZE)
        self.contents: dict[int, Content] = {}

    def block_of(self, content: Content) -> int:
        found = [block_id for block_id, held in self.contents.items() if held == content]
        assert len(found) <= 1
        return found[0] if found else NO_BLOCK

    def enter(self, block_id: int, content: Content, parent: BlockKey, token_ids: bytes) -> None:
        if block_id in self.contents:
            return
        is_new = self.block_of(content) == NO_BLOCK
        assert self.index.add(block_id, key_of(content), parent, token_ids) == is_new
        if is_new:
            self.contents[block_id] = content
            self.check_siblings(content)

    @rule(block_id=block_ids, salt=salts, path=paths)
    def add(self, block_id: int, salt: int, path: Path) -> None:
        held = token_bytes(array(path[-1]))
        self.enter(block_id, (salt, path), parent_of(salt, path), held)

    @rule(first=block_ids, salt=salts, start=st.integers(0, 4))
    def add_many_children(self, first: int, salt: int, start: int) -> None:
        for place in range(10):
            path = (((start + place // 5) % 5, place % 5),)
            block_id = (first + place) % NUM_BLOCKS
            self.enter(block_id, (salt, path), ROOTS[salt], token_bytes(array(path[0])))

    @rule(block_id=block_ids, sequence_id=st.integers(1, 2), logical_block=st.integers(0, 2))
    def add_private(self, block_id: int, sequence_id: int, logical_block: int) -> None:
        self.enter(block_id, (sequence_id, 1, logical_block), ROOTS[0], b"")

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.contents)))
        content = self.contents.pop(block_id)
        assert self.index.remove(block_id) == key_of(content)
        self.check_siblings(content)

    @precondition(lambda self: 0 < len(self.contents) < NUM_BLOCKS)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.contents)))
        target = data.draw(st.sampled_from(sorted(set(range(NUM_BLOCKS)) - set(self.contents))))
        self.index.move(source, target)
        self.contents = {
            target if block_id == source else block_id: content
            for block_id, content in self.contents.items()
        }
        self.check_siblings(self.contents[target])

    @rule(salt=salts, path=paths)
    def match(self, salt: int, path: Path) -> None:
        found = [self.block_of((salt, path[:end])) for end in range(1, len(path) + 1)]
        expected = list(takewhile(lambda block_id: block_id != NO_BLOCK, found))
        assert self.index.match(keys_of(salt, path)) == expected

    @rule(salt=salts, path=paths.map(lambda path: path[:-1]), wanted=st.lists(st.integers(0, 4)))
    def match_inside(self, salt: int, path: Path, wanted: list[int]) -> None:
        self.check_inside(salt, path, [tuple(wanted)])

    def check_siblings(self, content: Content) -> None:
        """Whatever is asked below the parent of what has just changed, the answer is right."""
        if len(content) == 2:
            pairs = list(product(range(5), repeat=2))
            self.check_inside(
                content[0], content[1][:-1], [*pairs, *((first,) for first in range(5))]
            )

    def check_inside(self, salt: int, path: Path, questions: list[tuple[int, ...]]) -> None:
        parent = keys_of(salt, path)[-1] if path else ROOTS[salt]
        children = [
            (block_id, content[1][-1])
            for block_id, content in reversed(self.contents.items())
            if len(content) == 2 and content[0] == salt and content[1][:-1] == path
        ]
        for wanted in questions:
            best = (NO_BLOCK, 0)
            for block_id, held in children[:NUM_CHILDREN_LOOKED_AT_MAX]:
                num_tokens = num_agreeing(held, wanted)
                if num_tokens > best[1]:
                    best = (block_id, num_tokens)
            assert self.index.match_inside(parent, array(wanted)) == best

    @invariant()
    def both_directions_agree_with_the_model(self) -> None:
        assert len(self.index) == len(self.contents)
        assert self.index.is_indexed.nonzero()[0].tolist() == sorted(self.contents)
        for block_id in range(NUM_BLOCKS):
            content = self.contents.get(block_id)
            key = None if content is None else key_of(content)
            assert self.index.key_of(block_id) == key
            if key is not None:
                assert self.index.block_of(key) == block_id

    @invariant()
    def every_block_knows_the_one_before(self) -> None:
        for block_id, content in self.contents.items():
            if len(content) == 2:
                salt, path = content
                before = self.block_of((salt, path[:-1])) if len(path) > 1 else NO_BLOCK
                assert self.index.block_before(block_id) == before


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, print_blob=True
)
