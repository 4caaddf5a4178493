"""What a step's result says of sequences, beside tokens."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pageframe.core.step import FinishReason, StepResult
from pageframe.executor.batch import DraftSamples, StepBatch, StepOutput
from pageframe.executor.memory.sequence_table import SequenceTable

NO_TOKEN = -1
"""Stands for the token of a sequence that ended with ``FinishReason.ERROR`` and got none."""


def report_computed(
    sequences: SequenceTable, batch: StepBatch, named_rows: set[int], result: StepResult
) -> None:
    """Say what the step computed of those that the plan named."""
    is_named = np.isin(batch.rows, list(named_rows))
    named = batch.rows[is_named]
    result.computed_ids = sequences.sequence_ids[named].tolist()
    result.first_positions = batch.positions[batch.query_start[:-1][is_named]].tolist()
    result.num_computed = batch.context_lens[is_named].tolist()


def report_error(result: StepResult, sequence_id: int, reason: str = "") -> None:
    """Say that a sequence ended with an error; a token that it got in this step still counts."""
    if reason:
        result.errors[sequence_id] = reason
    if sequence_id in result.sampled_ids:
        num_behind_last = result.sampled_ids[::-1].index(sequence_id)
        result.finish_reasons[-1 - num_behind_last] = FinishReason.ERROR
        return
    result.sampled_ids.append(sequence_id)
    result.token_ids.append(NO_TOKEN)
    result.finish_reasons.append(FinishReason.ERROR)


def report_sampled(
    sequences: SequenceTable,
    batch: StepBatch,
    output: StepOutput,
    reasons: NDArray[np.uint8],
    result: StepResult,
) -> None:
    """Say who got which token, and whether it ended there; ``reasons`` are uint8 [K]."""
    # Failed sequences may stand there already: positions of log-probabilities move behind them.
    num_before = len(result.sampled_ids)
    result.sampled_ids += sequences.sequence_ids[batch.sample_rows].tolist()
    result.token_ids += output.token_ids.tolist()
    result.finish_reasons += reasons.tolist()
    result.logprobs = {num_before + k: logprob for k, logprob in output.logprobs.items()}
    for row, logprobs in output.prompt_logprobs.items():
        result.prompt_logprobs[int(sequences.sequence_ids[row])] = logprobs


def report_candidates(
    sequences: SequenceTable, batch: StepBatch, output: StepOutput, result: StepResult
) -> None:
    """Say with which tokens beams could go on."""
    for index, candidates in output.candidates.items():
        row = batch.sample_rows[index]
        result.candidates[int(sequences.sequence_ids[row])] = candidates


def without_candidates(batch: StepBatch, output: StepOutput) -> tuple[StepBatch, StepOutput]:
    """The step as if only those had sampled that got a token."""
    got_token = np.ones(len(batch.sample_rows), dtype=np.bool_)
    got_token[list(output.candidates)] = False
    return only_samples(batch, replace(output, candidates={}), got_token)


def only_rows(
    batch: StepBatch, output: StepOutput, is_kept: NDArray[np.bool_]
) -> tuple[StepBatch, StepOutput]:
    """The step as if only some sequences had been in it: bool [S]. None has candidates."""
    batch, output = only_samples(batch, output, is_kept[batch.samples])
    place = np.cumsum(is_kept, dtype=np.int32) - 1
    rows = batch.rows[is_kept]
    failures = {row: reason for row, reason in output.failures.items() if row in rows}
    batch = replace(
        batch,
        rows=rows,
        context_lens=batch.context_lens[is_kept],
        samples=place[batch.samples],
    )
    return batch, replace(output, failures=failures)


def only_samples(
    batch: StepBatch, output: StepOutput, is_kept: NDArray[np.bool_]
) -> tuple[StepBatch, StepOutput]:
    """The step as if only some samples had been drawn: bool [K]. None has candidates."""
    index = (np.cumsum(is_kept) - 1).tolist()
    drafts = batch.drafts
    if drafts is not None:
        drafts = DraftSamples(drafts.num_behind[is_kept], drafts.expected[is_kept])
    batch = replace(
        batch,
        samples=batch.samples[is_kept],
        sample_rows=batch.sample_rows[is_kept],
        drafts=drafts,
    )
    output = replace(
        output,
        token_ids=output.token_ids[is_kept],
        logprobs={index[k]: logprob for k, logprob in output.logprobs.items() if is_kept[k]},
    )
    return batch, output
