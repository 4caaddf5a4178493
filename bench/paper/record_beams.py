"""Record who descends from whom in real beam searches: ``python -m bench.paper.record_beams``.

How much beams share depends on how soon the survivors have a common ancestor, and that depends on
how a language model spreads its probabilities. So beam searches of a real model over real prompts
are recorded once: for every step and beam, which beam of the step before it continues. The
recording replaces a synthetic model of scores.

The search is the plain one: the k best of all continuations by the sum of log-probabilities, ends
of sequence excluded (lengths come from the workload), no length penalty, no diversity term.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.paper.ancestry import ANCESTRY_PATH, write_recordings
from bench.paper.sharegpt import find_dataset, read_exchanges

# Width: prompts, all searched side by side. Wide searches are slow on a CPU, so there are fewer.
_NUM_PROMPTS = {2: 16, 4: 16, 6: 10, 8: 8, 16: 4, 32: 2, 64: 1}
_NUM_STEPS = 256
_NUM_PROMPT_TOKENS = (16, 128)
_SEED = 20230912


def choose_prompts(tokenizer: Any, dataset: Path, num_prompts: int) -> list[list[int]]:
    """Token ids of first human turns in the model's chat template, at random but repeatable."""
    exchanges = read_exchanges(dataset)
    order = np.random.default_rng(_SEED).permutation(len(exchanges))
    prompts: list[list[int]] = []
    shortest, longest = _NUM_PROMPT_TOKENS
    for index in order:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": exchanges[index].prompt}],
            tokenize=False,
            add_generation_prompt=True,
        )
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        if shortest <= len(token_ids) <= longest:
            prompts.append(token_ids)
        if len(prompts) == num_prompts:
            break
    return prompts


class BeamSearch:
    """Several prompts searched side by side, all with the same width.

    Args:
        model: A causal language model of transformers.
        prompts: Token ids of each prompt.
        width: Beams per prompt.
    """

    def __init__(self, model: Any, prompts: list[list[int]], width: int) -> None:
        self._model = model
        self._width = width
        self._num_prompts = len(prompts)
        eos = model.generation_config.eos_token_id
        self._eos = [eos] if isinstance(eos, int) else list(eos)
        longest = max(map(len, prompts))
        token_ids = torch.zeros((len(prompts), longest), dtype=torch.long)
        self._mask = torch.zeros((len(prompts), longest), dtype=torch.long)
        for index, prompt in enumerate(prompts):
            # Padding stands in front, so that all prompts end in the same column.
            token_ids[index, longest - len(prompt) :] = torch.tensor(prompt)
            self._mask[index, longest - len(prompt) :] = 1
        output = model(
            input_ids=token_ids,
            attention_mask=self._mask,
            position_ids=(self._mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        best = self._log_probabilities(output).topk(width)
        self._scores = best.values
        self._token_ids = best.indices.reshape(-1, 1)
        self._reorder(torch.arange(len(prompts)).repeat_interleave(width))

    def step(self) -> NDArray[np.uint8]:
        """Advance every beam by one token: the parent of each, uint8 [num_prompts, width]."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        output = self._model(
            input_ids=self._token_ids,
            attention_mask=self._mask,
            position_ids=(self._mask.cumsum(-1) - 1)[:, -1:],
            past_key_values=self._cache,
            use_cache=True,
        )
        log_probabilities = self._log_probabilities(output)
        vocab_size = log_probabilities.shape[-1]
        scores = self._scores.reshape(-1, 1) + log_probabilities
        best = scores.reshape(self._num_prompts, -1).topk(self._width)
        parents = best.indices // vocab_size
        self._scores = best.values
        self._token_ids = (best.indices % vocab_size).reshape(-1, 1)
        first_rows = torch.arange(self._num_prompts)[:, None] * self._width
        self._reorder((first_rows + parents).reshape(-1))
        result: NDArray[np.uint8] = parents.numpy().astype(np.uint8)
        return result

    def _log_probabilities(self, output: Any) -> torch.Tensor:
        log_probabilities = output.logits[:, -1].float().log_softmax(-1)
        log_probabilities[:, self._eos] = -torch.inf
        return log_probabilities

    def _reorder(self, rows: torch.Tensor) -> None:
        self._cache.reorder_cache(rows)
        self._mask = self._mask[rows]


def record(model: Any, prompts: list[list[int]], width: int) -> NDArray[np.uint8]:
    """Ancestry of searches over ``prompts``: uint8 [num_prompts, num_steps, width]."""
    with torch.inference_mode():
        search = BeamSearch(model, prompts, width)
        steps = [search.step() for _ in track(range(_NUM_STEPS), f"width {width}")]
    return np.stack(steps, axis=1)


def main() -> None:
    """Record every width and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder that `pageframe model prepare` prints")
    parser.add_argument("--dataset", type=Path, help="JSON file; default: the installed package")
    parser.add_argument("--output", type=Path, default=ANCESTRY_PATH)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    prompts = choose_prompts(
        tokenizer, arguments.dataset or find_dataset(), max(_NUM_PROMPTS.values())
    )
    recordings = {}
    for width, num_prompts in _NUM_PROMPTS.items():
        recordings[width] = record(model, prompts[:num_prompts], width)
        # Written as it grows: the wide searches take long.
        write_recordings(arguments.output, recordings)


if __name__ == "__main__":
    main()
