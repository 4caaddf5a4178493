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
            sample, completion = self._samples[index], part.completion
            if sample.feed(part) and completion is None:
                stopped.append(index)
            if completion is None and self._is_final:
                continue
            if sample.has_output:
                outputs.append(sample.take_delta(prompt_logprobs if index == 0 else []))
            if completion is not None:
                # By itself, and without tokens: so a caller whose stream breaks right before the
                # end knows whether it has it.
                sample.finish()
                if sample.has_output:
                    outputs.append(sample.take_delta([]))
                self.ends[index] = sample.end(completion)
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

    @property
    def has_output(self) -> bool:
        """Whether a delta is due."""
        return bool(self._token_ids or self._text)

    def feed(self, part: Pending) -> bool:
        """Take tokens; whether a stop string has ended the output just now."""
        stream, token_ids = self.stream, part.token_ids
        # Tokens that were on their way when a stop string ended the output are nobody's.
        if not token_ids or stream.is_stopped:
            return False
        text, num_tokens = stream.feed(token_ids)
        self._text += text
        self._token_ids += token_ids[:num_tokens]
        if part.logprobs:
            self._logprobs += part.logprobs[:num_tokens]
        return stream.is_stopped

    def finish(self) -> None:
        self._text += self.stream.finish()

    def take_delta(self, prompt_logprobs: list[TokenLogprobs]) -> OutputDelta:
        """All output that has not gone out yet."""
        delta = OutputDelta(
            self.index, self._text, self._token_ids, self._logprobs, prompt_logprobs.copy()
        )
        prompt_logprobs.clear()
        self._text, self._token_ids, self._logprobs = "", [], []
        return delta

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
