"""Tokenisers that several tests need, made once."""

import sys
from pathlib import Path

import pytest

from pageframe.gateway.tokenizer import TextCodec
from unit.gateway import tiny_tokenizers
from unit.gateway.chat_house import TEMPLATE
from unit.gateway.fake_link import FakeLink
from unit.gateway.replicas import make_facts


@pytest.fixture(scope="session", params=sorted(tiny_tokenizers.ALL))
def tokenizer_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A folder for each kind of tokeniser."""
    return tiny_tokenizers.ALL[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def byte_level_codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    return TextCodec.load(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("codec")))


@pytest.fixture(scope="session")
def tool_folder(tmp_path_factory):
    """A tokeniser whose chat template knows tools."""
    folder = tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tools"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return tiny_tokenizers.byte_level(tmp_path_factory.mktemp("model"))


@pytest.fixture
def link(model_folder):
    return FakeLink(make_facts(model_folder=str(model_folder)))


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    """The embedded model; prepared on first use."""
    from pageframe.cli.console import PlainConsole
    from pageframe.cli.model_prepare import prepare_model
    from pageframe.config.model_settings import EMBEDDED_MODEL

    return prepare_model(EMBEDDED_MODEL, PlainConsole(sys.stderr))
