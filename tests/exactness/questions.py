"""Prompts that begin alike, some of them chats of two turns, with Hugging Face's answers."""

from dataclasses import dataclass
from pathlib import Path

import torch

from exactness import tiny_models
from exactness.tiny_models import GreedyAnswer

MAX_NEW_TOKENS = 12
# Tokens of the common text and of the own end; a chat's second turn adds so many more.
_CUTS = ((288, 9), (256, 1), (288, 40), (130, 17), (64, 5), (200, 1), (33, 30), (288, 3))
_SECOND_TURNS = (21, 3, 40)
NUM_TOKENS_MAX = 288 + 9 + MAX_NEW_TOKENS + 40 + MAX_NEW_TOKENS
"""No question with its answer is longer."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt; those with ``chat`` 0 stand alone, the second turn of a chat follows its first."""

    prompt: list[int]
    answer: GreedyAnswer
    chat: int = 0
    turn: int = 1


@dataclass(frozen=True, slots=True)
class Exam:
    """A tiny model and what Hugging Face's own says to each question."""

    folder: Path
    model: torch.nn.Module
    questions: list[Question]

    def logprobs(self, token_ids: list[int], num_prompt_tokens: int) -> list[float]:
        """Natural log-probability of each token behind the prompt, by Hugging Face."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([token_ids])).logits[0, num_prompt_tokens - 1 : -1]
        chosen = torch.tensor(token_ids[num_prompt_tokens:])[:, None]
        told: list[float] = logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
        return told


def prepare(name: str, folder: Path) -> Exam:
    """Build the family's model and ask it all questions."""
    tiny_models.build(name, folder)
    lengths = [288, 288, *(end for _, end in _CUTS), *_SECOND_TURNS]
    texts = tiny_models.prompts(lengths, seed=1)
    ends, more = texts[2 : 2 + len(_CUTS)], texts[2 + len(_CUTS) :]
    prompts = [
        texts[index % 2][:common] + end
        for index, ((common, _), end) in enumerate(zip(_CUTS, ends, strict=True))
    ]
    answers = tiny_models.hf_greedy(folder, prompts, MAX_NEW_TOKENS)
    second = [
        prompt + answer.token_ids + tokens
        for prompt, answer, tokens in zip(prompts, answers, more, strict=False)
    ]
    questions = [
        Question(prompt, answer, chat=index + 1 if index < len(second) else 0)
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    questions += [
        Question(prompt, answer, chat=index + 1, turn=2)
        for index, (prompt, answer) in enumerate(
            zip(second, tiny_models.hf_greedy(folder, second, MAX_NEW_TOKENS), strict=True)
        )
    ]
    model = tiny_models.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Exam(folder, model, questions)
