"""Tokenisers that are loaded before a replica has named them."""

import asyncio

import pytest

from pageframe.core.errors import PreconditionError
from pageframe.gateway.codec_store import CodecStore
from unit.gateway.replicas import make_facts


def test_a_codec_that_was_loaded_ahead_is_the_replicas(model_folder, tmp_path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to(model_folder)
    loads = []

    async def run():
        store = CodecStore()
        await store.load_ahead(link)
        monkeypatch.setattr("pageframe.gateway.codec_store._load", loads.append)
        return await store.find(make_facts(model_folder=str(model_folder.resolve())))

    codec = asyncio.run(run())
    assert codec is not None
    assert codec.encode("a") != []
    assert loads == []


def test_a_folder_without_a_tokeniser_is_complained_of_when_a_replica_names_it(tmp_path):
    store = CodecStore()
    asyncio.run(store.load_ahead(tmp_path))
    with pytest.raises(PreconditionError) as raised:
        asyncio.run(store.find(make_facts(model_folder=str(tmp_path))))
    assert raised.value.reason == "TOKENIZER_MISSING"
