"""Tiny random models of all kinds, saved as Hugging Face folders, and HF's own greedy answers.

Weights are drawn ten times wider than usual, so that logits lie far apart and a greedy choice is
never decided by rounding. ``NATIVE`` families are taken by the native runner, the others by the
transformers runner.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

VOCAB_SIZE = 199
GAP_MIN = 1e-4
"""Where HF's two best logits are closer than this, rounding decides and comparison stops."""

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Small, so that the test's positions reach all three regions of the scaling.
    "original_max_position_embeddings": 32,
}


def _llama() -> PreTrainedConfig:
    return transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True)


def _llama31() -> PreTrainedConfig:
    return transformers.LlamaConfig(**_SIZES, rope_parameters=_LLAMA3_ROPE, attention_bias=True)


def _mistral() -> PreTrainedConfig:
    return transformers.MistralConfig(**_SIZES, sliding_window=11, head_dim=16)


def _qwen2() -> PreTrainedConfig:
    # The upper layers slide, the lower ones see everything.
    return transformers.Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=1
    )


def _qwen3() -> PreTrainedConfig:
    # All query heads share one head of keys and values.
    return transformers.Qwen3Config(**_SIZES | {"num_key_value_heads": 1}, head_dim=16)


def _mixtral() -> PreTrainedConfig:
    return transformers.MixtralConfig(
        **_SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=13
    )


def _gpt2() -> PreTrainedConfig:
    return transformers.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=48,
        n_layer=3,
        n_head=4,
        n_positions=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        scale_attn_by_inverse_layer_idx=True,
    )


def _opt() -> PreTrainedConfig:
    return transformers.OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        ffn_dim=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=48,
        max_position_embeddings=512,
        init_std=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def _gemma2() -> PreTrainedConfig:
    # Layers slide in turns.
    return transformers.Gemma2Config(
        **_SIZES | {"num_hidden_layers": 4},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=13,
        attn_logit_softcapping=None,
        # Tied, so small a model says its last token again, whatever it attends to.
        tie_word_embeddings=False,
    )


def _gemma3() -> PreTrainedConfig:
    # Each third layer sees everything.
    return transformers.Gemma3TextConfig(
        **_SIZES | {"num_hidden_layers": 6},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=9,
        sliding_window_pattern=3,
        tie_word_embeddings=False,
    )


def _falcon(**changes) -> PreTrainedConfig:
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return transformers.FalconConfig(**sizes | changes)


def _falcon_7b() -> PreTrainedConfig:
    # One head of keys for all; both halves of a layer behind the same norm.
    return _falcon()


def _falcon_rw() -> PreTrainedConfig:
    # Slopes of six heads are those of four and two of eight.
    return _falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True)


def _falcon_40b() -> PreTrainedConfig:
    return _falcon(new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False)


def _falcon_11b() -> PreTrainedConfig:
    return _falcon(
        new_decoder_architecture=True,
        num_kv_heads=3,
        num_ln_in_parallel_attn=1,
        ffn_hidden_size=80,
        rope_theta=5e5,
    )


_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _llama,
    "llama31": _llama31,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mixtral": _mixtral,
    "gpt2": _gpt2,
    "opt": _opt,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "falcon-7b": _falcon_7b,
    "falcon-rw": _falcon_rw,
    "falcon-40b": _falcon_40b,
    "falcon-11b": _falcon_11b,
}
NAMES = tuple(_CONFIGS)[:8]
MIXED = ("qwen2", "gemma2", "gemma3")
"""Families of which some layers slide and some see everything."""
FALCONS = ("falcon-7b", "falcon-rw", "falcon-40b", "falcon-11b")
"""Named after the models that are built so."""
NATIVE = ("llama", "llama31", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class GreedyAnswer:
    """What HF generates, and how sure it was.

    Attributes:
        token_ids: Output only, end-of-sequence ignored.
        gaps: Best logit minus second best, for each of them.
    """

    token_ids: list[int]
    gaps: list[float]

    @property
    def num_certain(self) -> int:
        """Tokens before the first one that rounding may decide."""
        for index, gap in enumerate(self.gaps):
            if gap < GAP_MIN:
                return index
        return len(self.gaps)


def build(name: str, folder: Path, max_shard_size: str = "5GB") -> Path:
    """Save the family's tiny model into ``folder``, float32, the same weights every time."""
    torch.manual_seed(tuple(_CONFIGS).index(name))
    model = AutoModelForCausalLM.from_config(_CONFIGS[name](), dtype=torch.float32)
    with torch.no_grad():
        # Biases and norms start out as 0 and 1, which would hide that they are left out.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths
    ]


def hf_greedy(
    folder: Path, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int
) -> list[GreedyAnswer]:
    """Greedy ``generate`` of transformers in float32, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # End-of-sequence would cut answers short; without one, all have the same length.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    answers = []
    for prompt in prompt_ids:
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        best = torch.stack([logits[0] for logits in output.logits]).topk(2).values
        answers.append(
            GreedyAnswer(
                token_ids=output.sequences[0, len(prompt) :].tolist(),
                gaps=(best[:, 0] - best[:, 1]).tolist(),
            )
        )
    return answers
