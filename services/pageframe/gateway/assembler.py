"""From a request's tokens to what its caller sees; free of any wire and any waiting."""

import dataclasses
from collections.abc import Mapping, Sequence

from pageframe.core.request import Completion, Delivery
from pageframe.core.step import FinishReason, TokenLogprobs
from pageframe.gateway.mailbox import Pending
from pageframe.gateway.output import Output, OutputDelta, SampleEnd
from pageframe.gateway.sample_stream import SampleStream


class OutputAssembler:
    """Turns the pending tokens of all samples of one request into outputs.

    Attributes:
        ends: The samples that have ended, by index.
    """

    def __init__(self, streams: Sequence[SampleStream], delivery: Delivery) -> None:
        """One stream for each sample; ``Delivery.FINAL`` keeps all output for the end."""
        self.ends: dict[int, SampleEnd] = {}
        self._samples = [_Sample(index, stream) for index, stream in enumerate(streams)]
        self._is_final = delivery is Delivery.FINAL

    @property
    def is_done(self) -> bool:
        """Whether every sample has ended."""
        return len(self.ends) == len(self._samples)

    @property
    def num_tokens(self) -> int:
        """Tokens of the output so far, over all samples."""
        return sum(sample.stream.num_tokens for sample in self._samples)

    def accept(
        self, pending: Mapping[int, Pending], prompt_logprobs: list[TokenLogprobs]
    ) -> tuple[list[Output], list[int]]:
        """Take what has gathered.

        Args:
            pending: By sample index.
            prompt_logprobs: Figures of the prompt that have not gone out yet. They are taken out
                of the list when a delta of sample 0 carries them.

        Returns:
            What to tell the caller, and the samples that a stop string has just ended while the
            scheduler still runs them.
        """
        outputs: list[Output] = []
        stopped: list[int] = []
        for index, part in pending.items():
            sample = self._samples[index]
            was_stopped = sample.stream.is_stopped
            sample.feed(part)
            if part.completion is None and sample.stream.is_stopped and not was_stopped:
                stopped.append(index)
            if part.completion is not None or not self._is_final:
                outputs += sample.take_delta(prompt_logprobs if index == 0 else [])
            if part.completion is not None:
                # By itself, and without tokens: so a caller whose stream breaks right before the
                # end knows whether it has it.
                sample.finish()
                outputs += sample.take_delta([])
                self.ends[index] = sample.end(part.completion)
                outputs.append(self.ends[index])
        return outputs, stopped


class _Sample:
    """One sample: its stream, and the output that has not gone out yet."""

    def __init__(self, index: int, stream: SampleStream) -> None:
        self.index = index
        self.stream = stream
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def feed(self, part: Pending) -> None:
        # Tokens that were on their way when a stop string ended the output are nobody's.
        if self.stream.is_stopped or not part.token_ids:
            return
        delta = self.stream.feed(part.token_ids)
        self._text += delta.text
        self._token_ids += part.token_ids[: delta.num_tokens]
        self._logprobs += part.logprobs[: delta.num_tokens]

    def finish(self) -> None:
        self._text += self.stream.finish().text

    def take_delta(self, prompt_logprobs: list[TokenLogprobs]) -> list[Output]:
        """The delta that is due, if there is anything in it."""
        if not (self._text or self._token_ids):
            return []
        delta = OutputDelta(
            sample_index=self.index,
            text=self._text,
            token_ids=self._token_ids,
            logprobs=self._logprobs,
            prompt_logprobs=list(prompt_logprobs),
        )
        prompt_logprobs.clear()
        self._text, self._token_ids, self._logprobs = "", [], []
        return [delta]

    def end(self, completion: Completion) -> SampleEnd:
        stop = self.stream.stop
        reason = FinishReason.STOP if stop else completion.finish_reason
        return SampleEnd(
            sample_index=self.index,
            finish_reason=reason,
            stop=stop,
            completion=dataclasses.replace(
                completion, finish_reason=reason, num_output_tokens=self.stream.num_tokens
            ),
        )
