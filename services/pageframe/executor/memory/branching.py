"""Branches: how sequences that reported candidates go on, as one or as several.

    plan         a ─▶ a, d      b ─▶ e, f      c is in `finish`
    rows         a  d           e  f           b ends once e and f refer to its blocks

A *family* is a parent and its children; the parent may be one of them. All children share all of
the parent's blocks, the last partly filled one too, and each writes its new token in this very
step: the ordinary rule for writers (law 6) then copies that block for all but one of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pageframe.core.plan import Branches
from pageframe.core.step import SequenceAccount
from pageframe.core.trace import KvCause
from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.sequence_table import NO_ROW, Sequence
from pageframe.executor.memory.sharing import can_fork, inherit, seat_heir


@dataclass(slots=True, eq=False)
class Family:
    """One parent, and with which token each of its children goes on.

    Attributes:
        parent: Runs, and all its tokens are computed.
        token_ids: By child id.
    """

    parent: Sequence
    token_ids: dict[int, int] = field(default_factory=dict)

    @property
    def goes_on(self) -> bool:
        """Whether the parent is one of its children."""
        return self.parent.sequence_id in self.token_ids

    @property
    def num_more(self) -> int:
        """By how much the references to its blocks, and the rows that it takes, grow."""
        return len(self.token_ids) - 1


@dataclass(slots=True)
class Branched:
    """What became of families.

    Attributes:
        rows: Rows that have a new token to compute, in the order of the plan.
        children: Those of the sequences there that are new.
        extended: The others: their rows, and the token that each got.
        ended: Parents that are no child of theirs: id, the row that they had, and their account.
    """

    rows: list[int] = field(default_factory=list)
    children: list[Sequence] = field(default_factory=list)
    extended: list[tuple[int, int]] = field(default_factory=list)
    ended: list[tuple[int, int, SequenceAccount]] = field(default_factory=list)


def find_families(
    memory: KvMemory, branches: Branches, leaving: list[int]
) -> tuple[dict[int, Family], list[int]]:
    """The families of a plan by their parents' rows, and the ids of parents that are stale.

    Stale is who is gone, is of another generation, has lost a block, or has tokens to compute.
    """
    families: dict[int, Family] = {}
    stale_ids: list[int] = []
    for parent_id, generation, child_id, token_id in zip(
        branches.parent_ids,
        branches.generations,
        branches.child_ids,
        branches.token_ids,
        strict=True,
    ):
        parent = memory.sequences.get(parent_id)
        is_new = child_id == parent_id or memory.sequences.get(child_id) is None
        if (
            parent is None
            or parent.generation != generation
            or parent.row in (NO_ROW, *leaving)
            or not (is_new and _waits_for_branches(memory, parent))
        ):
            stale_ids.append(parent_id)
            continue
        families.setdefault(parent.row, Family(parent)).token_ids[child_id] = token_id
    return families, stale_ids


def branch(memory: KvMemory, families: Iterable[Family]) -> Branched:
    """Let families go on: children are seated, and everyone gets its token.

    There have to be as many empty rows as there are more children than parents.
    """
    branched = Branched()
    token_ids: list[int] = []
    for family in families:
        parent = family.parent
        heirs = [
            inherit(
                memory,
                parent,
                child_id,
                parent.sample_index,
                parent.trace_context[1],
                parent.generation,
            )
            for child_id in family.token_ids
            if child_id != parent.sequence_id
        ]
        if not family.goes_on:
            row = parent.row
            account = memory.forget(parent, KvCause.FINISHED)
            branched.ended.append((parent.sequence_id, row, account))
        branched.children += [seat_heir(memory, heir) for heir in heirs]
        for child_id, token_id in family.token_ids.items():
            row = memory.sequences.by_id(child_id).row
            branched.rows.append(row)
            token_ids.append(token_id)
            if child_id == parent.sequence_id:
                branched.extended.append((row, token_id))
    rows: Int32Array = np.array(branched.rows, dtype=np.int32)
    memory.sequences.append_tokens(rows, np.array(token_ids, dtype=np.int32))
    return branched


def _waits_for_branches(memory: KvMemory, parent: Sequence) -> bool:
    sequences, row = memory.sequences, parent.row
    has_computed = sequences.num_tokens[row] == sequences.num_computed[row]
    return bool(has_computed) and can_fork(memory, parent)
