"""A tiny model with a long context, and chats of two turns that fill it."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from pageframe.core.units import ceil_div

_VOCAB_SIZE = 499
_SEED = 20260923


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of model and chats; tokens unless it says otherwise.

    Attributes:
        num_context_tokens: Both turns of a chat with their answers.
        num_turn_tokens: What the second turn adds to the first turn and its answer.
        num_new_tokens: Of each answer.
        num_chats: Chats.
        chunk_tokens: Of a prompt in one step.
        block_size: Tokens per block.
        num_layers: Of the model.
        num_heads: Query heads.
        num_kv_heads: Heads of keys and values.
        head_dim: Of each.
    """

    num_context_tokens: int
    num_turn_tokens: int
    num_new_tokens: int
    num_chats: int
    chunk_tokens: int
    block_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def num_first_tokens(self) -> int:
        """Of the first turn's prompt."""
        return self.num_context_tokens - self.num_turn_tokens - 2 * self.num_new_tokens

    @property
    def num_blocks_per_chat(self) -> int:
        """To hold all of it."""
        return ceil_div(self.num_context_tokens, self.block_size)


def build_model(shape: Shape, folder: Path) -> None:
    """Save a Llama of random weights, drawn so wide that rounding decides no greedy choice."""
    torch.manual_seed(_SEED)
    hidden_size = 2 * shape.num_heads * shape.head_dim
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=_VOCAB_SIZE,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.num_context_tokens,
            initializer_range=0.3,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )
    model.save_pretrained(folder)


def make_prompts(shape: Shape) -> tuple[list[list[int]], list[list[int]]]:
    """Random tokens: of each chat's first turn, and what its second turn adds to it."""
    generator = torch.Generator().manual_seed(_SEED)

    def draw(num_tokens: int) -> list[int]:
        return torch.randint(3, _VOCAB_SIZE, (num_tokens,), generator=generator).tolist()

    return (
        [draw(shape.num_first_tokens) for _ in range(shape.num_chats)],
        [draw(shape.num_turn_tokens) for _ in range(shape.num_chats)],
    )


def ask_hugging_face(shape: Shape, folder: Path) -> list[list[int]]:
    """Its greedy answers to both turns of the first chat."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    first_prompts, additions = make_prompts(shape)
    token_ids: list[int] = []
    answers = []
    for added in (first_prompts[0], additions[0]):
        token_ids += added
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([token_ids]),
                attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
                max_new_tokens=shape.num_new_tokens,
                do_sample=False,
            )
        answers.append(output[0, len(token_ids) :].tolist())
        token_ids += answers[-1]
    return answers
