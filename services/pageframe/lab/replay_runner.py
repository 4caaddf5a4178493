"""A model runner that has seen it all: it gives the tokens that a recorded run sampled."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from pageframe.core.errors import InvalidRequestError
from pageframe.core.plan import StepPlan
from pageframe.core.replica import ReplicaFacts
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import RefusedBecause, StepResult
from pageframe.executor.batch import Flight, Int32Array, ModelFacts, StepBatch, StepOutput
from pageframe.executor.block_moves import Int64Array
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.lab.tensorless import TensorlessRunner

_NO_TOKEN = -1
_NOBODY = 0


class RecordedFailureError(RuntimeError):
    """The recorded runner failed in this step, and so does this one."""


@dataclass(frozen=True, slots=True)
class _RecordedFlight:
    """See ``Flight``."""

    runner: "ReplayRunner"
    batch: StepBatch
    is_ahead: bool

    takes_cores = False

    def wait(self) -> None:
        """Nothing computes."""

    def collect(self) -> StepOutput:
        """See ``Flight.collect``."""
        return self.runner.execute(self.batch)


class ReplayRunner(TensorlessRunner):
    """Answers each step from a recorded result.

    Args:
        facts: What the recorded executor served.

    Attributes:
        engine: Who drives it; says whose row is whose.
        recorded: The result of the step that comes.
        is_ahead: Whether a device computed it beside Python.
    """

    def __init__(self, facts: ReplicaFacts) -> None:
        windows = facts.kv_group_windows
        self.facts = ModelFacts(
            name=facts.model,
            folder=facts.model_folder,
            vocab_size=facts.vocab_size,
            max_model_len=facts.max_model_len,
            eos_token_ids=facts.eos_token_ids,
            kv_bytes_per_token=facts.kv_bytes_per_token,
            device=facts.device,
            dtype=facts.dtype,
            kv_dtype=facts.kv_dtype,
            runner=facts.runner,
            window_tokens=windows[0] if len(windows) == 1 else 0,
            group_windows=windows if len(windows) > 1 else (),
            takes_grammars=facts.takes_grammars,
        )
        self.engine: StepEngine
        self.recorded: StepResult
        self.is_ahead = False

    def admit(
        self,
        row: int,
        *,
        sampling: SamplingParams,
        sample_index: int,
        token_ids: Int32Array,
        num_prompt_tokens: int,
    ) -> None:
        """Fail where the recorded runner did.

        Raises:
            InvalidRequestError: with the reason that was recorded.
        """
        sequence_id = int(self.engine.memory.sequences.sequence_ids[row])
        reason = self.recorded.errors.get(sequence_id)
        if reason and sequence_id not in self.recorded.computed_ids:
            raise InvalidRequestError(reason, "it could not be admitted when it was recorded")

    def unready(self, _plan: StepPlan, _memory: KvMemory) -> frozenset[int]:
        """Who was not admitted in the recorded step because something had to be made for it."""
        recorded = self.recorded
        return frozenset(
            sequence_id
            for sequence_id, because in zip(
                recorded.refused_ids, recorded.refused_because, strict=True
            )
            if because == RefusedBecause.NOT_READY
        )

    def launch(self, batch: StepBatch) -> Flight:
        """Begin a step; what it yields is only known when it is collected."""
        batch.on_launch()
        return _RecordedFlight(self, batch, self.is_ahead)

    def execute(self, batch: StepBatch) -> StepOutput:
        """Give each sequence what it got in the recorded step.

        Where drafts were checked a sequence samples more often than it got tokens; what it sampled
        behind the last one that it kept does not matter.

        Raises:
            RecordedFailureError: the recorded runner failed here.
        """
        recorded = self.recorded
        sequence_ids: Int64Array = self.engine.memory.sequences.sequence_ids
        tokens: dict[int, deque[int]] = {}
        places: dict[int, int] = {}
        for place, (sequence_id, token_id) in enumerate(
            zip(recorded.sampled_ids, recorded.token_ids, strict=True)
        ):
            if token_id != _NO_TOKEN:
                tokens.setdefault(sequence_id, deque()).append(token_id)
                places.setdefault(sequence_id, place)
        sampled_ids = sequence_ids[batch.sample_rows].tolist()
        failed_ids = {
            sequence_id
            for sequence_id, token_id in zip(recorded.sampled_ids, recorded.token_ids, strict=True)
            if token_id == _NO_TOKEN
        }
        known_ids = set(sequence_ids[batch.rows].tolist()) - {_NOBODY}
        if known_ids and known_ids <= failed_ids:
            # It fails as a whole: everybody in it ends, whether or not it would have sampled.
            raise RecordedFailureError(f"step {recorded.step} failed when it was recorded")
        output = StepOutput(token_ids=np.zeros(len(sampled_ids), dtype=np.int32))
        for index, sequence_id in enumerate(sampled_ids):
            if sequence_id in recorded.candidates:
                output.token_ids[index] = _NO_TOKEN
                output.candidates[index] = recorded.candidates[sequence_id]
            elif left := tokens.get(sequence_id):
                output.token_ids[index] = left.popleft()
                logprobs = recorded.logprobs.get(places[sequence_id])
                places[sequence_id] += 1
                if logprobs is not None:
                    output.logprobs[index] = logprobs
        for row in batch.rows.tolist():
            if reason := recorded.errors.get(int(sequence_ids[row])):
                output.failures[row] = reason
            prompt_logprobs = recorded.prompt_logprobs.get(int(sequence_ids[row]))
            if prompt_logprobs is not None:
                output.prompt_logprobs[row] = prompt_logprobs
        return output
