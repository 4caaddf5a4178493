"""A drafter that knows what will come, and is wrong when it is told to be."""

import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from pageframe.executor.drafting import Proposals
from pageframe.executor.memory.sequence_table import SequenceTable
from unit.executor.fake_runner import VOCAB_SIZE, next_token


class PlayedDrafter:
    """Guesses what the fake runner will sample.

    Args:
        is_right: Asked for each guess: its place behind the newest token.
        sample_index_of: Which sample a sequence is.
    """

    def __init__(
        self,
        is_right: Callable[[int], bool] = lambda _: True,
        sample_index_of: Callable[[int], int] = lambda _: 0,
    ) -> None:
        self.is_right = is_right
        self.sample_index_of = sample_index_of
        self.num_resets = 0

    def propose(self, sequences: SequenceTable, rows: np.ndarray, num_tokens: int) -> Proposals:
        guesses = [self._guess(sequences, row, num_tokens) for row in rows.tolist()]
        acceptance = np.linspace(0.9, 0.8, len(rows))
        return Proposals(np.array(guesses, dtype=np.int32).reshape(len(rows), -1), acceptance)

    def reset(self) -> None:
        self.num_resets += 1

    def _guess(self, sequences: SequenceTable, row: int, num_tokens: int) -> Sequence[int]:
        history = sequences.tokens_of(row).tolist()
        sample_index = self.sample_index_of(int(sequences.sequence_ids[row]))
        guesses = []
        for place in range(num_tokens):
            token_id = next_token(np.array(history), sample_index)
            history.append(token_id)
            guesses.append(token_id if self.is_right(place) else (token_id + 1) % VOCAB_SIZE)
        return guesses


class KnowingDrafter:
    """Guesses what an undisturbed run gave, and is wrong in three of ten tokens.

    Args:
        texts: Prompts with their outputs; that of one history is taken for that of all.
    """

    def __init__(self, texts: Iterable[tuple[Sequence[int], Sequence[int]]]) -> None:
        self.random = random.Random(1)
        self.next_tokens: dict[tuple[int, ...], int] = {}
        for prompt, output in texts:
            history = tuple(prompt)
            for token_id in output:
                self.next_tokens[history] = token_id
                history += (token_id,)

    def propose(self, sequences: SequenceTable, rows: np.ndarray, num_tokens: int) -> Proposals:
        guesses = np.zeros((len(rows), num_tokens), dtype=np.int32)
        for index, row in enumerate(rows.tolist()):
            history = tuple(sequences.tokens_of(row).tolist())
            for place in range(num_tokens):
                token_id = self.next_tokens.get(history, 0)
                history += (token_id,)
                guesses[index, place] = token_id if self.random.random() < 0.7 else 7
        return Proposals(guesses, np.full(len(rows), 0.7))

    def reset(self) -> None:
        pass


def sometimes(rng: random.Random, chance: float) -> Callable[[int], bool]:
    return lambda _: rng.random() < chance
