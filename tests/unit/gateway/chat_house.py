"""Chats with OpenAI's own client, against a scheduler that the test plays."""

import asyncio

import openai
import pytest

from unit.gateway.http_house import http_house
from unit.gateway.replicas import make_facts

TEMPLATE = """{% if tools %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<tool_call>{% endif %}{% for message in messages %}[{{ message.role }}]\
{{ message.content }}{% for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}\
{% endfor %}{% if message.tool_call_id %}({{ message.tool_call_id }}){% endif %}
{% endfor %}"""
HI = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'


def with_house(folder, scenario, *script, **options):
    async def run():
        facts = make_facts(model_folder=str(folder), max_model_len=1024, num_blocks=128)
        async with asyncio.timeout(60), http_house(folder, facts, *script, **options) as house:
            return await scenario(house)

    return asyncio.run(run())


def ask(house, **fields):
    return house.client.chat.completions.create(**{"model": "tiny", "messages": HI} | fields)


async def refusal(house, **fields):
    with pytest.raises(openai.APIStatusError) as caught:
        await ask(house, **fields)
    return caught.value
