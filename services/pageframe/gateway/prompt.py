"""Text or a chat to prompt tokens, without holding up the other streams of the process."""

import asyncio
from collections.abc import Sequence

from pageframe.core.errors import OutOfRangeError
from pageframe.core.replica import ReplicaFacts
from pageframe.gateway.chat import ChatMessage, Tool
from pageframe.gateway.tokenizer import TextCodec
from pageframe.gateway.validation import check_prompt_length

# Longer text is encoded on another thread: the event loop serves other streams meanwhile.
_INLINE_NUM_CHARACTERS_MAX = 4096


async def encode_prompt(
    codec: TextCodec,
    text: str | None,
    messages: Sequence[ChatMessage] | None,
    facts: ReplicaFacts,
    tools: Sequence[Tool] = (),
) -> list[int]:
    """Token ids of a text or a chat; long text is encoded beside the event loop.

    Exactly one of ``text`` and ``messages`` is not None; ``tools`` are those that the model of a
    chat is told of.

    Raises:
        InvalidRequestError: the chat template is missing, or refuses the messages or tools.
        OutOfRangeError: reason CONTEXT_TOO_LONG, quickly, for text that is far too long.
    """
    add_special_tokens = messages is None
    if messages is not None:
        text = codec.render_chat(messages, tools)
    assert text is not None, "there is neither text nor chat"
    if len(text) > _INLINE_NUM_CHARACTERS_MAX:
        return await asyncio.to_thread(_encode_long, codec, text, add_special_tokens, facts)
    return codec.encode(text, add_special_tokens=add_special_tokens)


def _encode_long(
    codec: TextCodec, text: str, add_special_tokens: bool, facts: ReplicaFacts
) -> list[int]:
    num_tokens = codec.num_tokens_at_least(text, facts.max_model_len)
    if num_tokens > facts.max_model_len:
        raise OutOfRangeError(
            "CONTEXT_TOO_LONG",
            f"the prompt has at least {num_tokens} tokens; the model's length is "
            f"{facts.max_model_len}",
            num_prompt_tokens_at_least=num_tokens,
            max_model_len=facts.max_model_len,
        )
    token_ids = codec.encode_released(text, add_special_tokens=add_special_tokens)
    check_prompt_length(len(token_ids), facts)
    return token_ids
