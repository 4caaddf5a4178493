"""What a person may get wrong about a model, each with its own reason."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from exactness import tiny_models
from pageframe.core.errors import (
    InvalidRequestError,
    NotFoundError,
    PageframeError,
    PreconditionError,
    ResourceExhaustedError,
    UnimplementedError,
)
from pageframe.executor.model import device as device_module
from pageframe.executor.model import dtypes, load_checks
from pageframe.executor.model.decoder_config import parse_decoder_config
from pageframe.executor.model.device import choose_device
from pageframe.executor.model.loader import eos_token_ids, load_runner, read_config
from pageframe.executor.model.native_choice import NativeRequest, load_native
from pageframe.kernels.cpu import library


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.build("llama", tmp_path_factory.mktemp("model") / "tiny-llama")


def _reason(expected, **arguments):
    with pytest.raises(expected) as caught:
        load_runner(**{"device": "cpu", **arguments})
    assert isinstance(caught.value, PageframeError)
    return caught.value.reason


def _copy_with_config(folder, target, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    return str(target)


def test_facts_describe_the_model(folder):
    told = []
    runner = load_runner(str(folder), device="cpu", progress=lambda *at: told.append(at))
    facts = runner.facts
    assert (facts.name, facts.folder) == ("tiny-llama", str(folder))
    assert (facts.vocab_size, facts.max_model_len) == (tiny_models.VOCAB_SIZE, 512)
    assert facts.eos_token_ids == (2,)
    assert facts.kv_bytes_per_token == 3 * 2 * 2 * 8 * 4
    assert (facts.device, facts.dtype, facts.kv_dtype) == ("cpu", "float32", "float32")
    assert facts.runner == "native"
    fractions = [fraction for _, fraction in told]
    assert 5 < len(fractions) <= 101
    assert fractions == sorted(set(fractions))
    assert fractions[-1] > 0.9
    assert load_runner(str(folder), device="cpu", name="other").facts.name == "other"


def test_sim_runner_needs_no_weights(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    facts = load_runner(str(tmp_path), runner="sim", name="pretence").facts
    assert (facts.name, facts.runner, facts.device) == ("pretence", "sim", "sim")
    assert (facts.vocab_size, facts.max_model_len) == (tiny_models.VOCAB_SIZE, 512)


def test_number_of_threads_is_obeyed(folder):
    load_runner(str(folder), device="cpu", num_threads=2)
    assert torch.get_num_threads() == 2
    load_runner(str(folder), device="cpu", num_threads=1)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("has_instructions", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_dtype_is_the_checkpoints_where_the_cpu_has_it(
    monkeypatch, folder, tmp_path, has_instructions, dtype
):
    monkeypatch.setattr(dtypes, "can_pack", lambda _: has_instructions)
    copy = _copy_with_config(folder, tmp_path, dtype="bfloat16")
    facts = load_runner(copy, device="cpu", cpu_kernels="torch").facts
    assert (facts.dtype, facts.kv_dtype) == (dtype, dtype)
    asked_for = load_runner(copy, device="cpu", dtype="bfloat16", kv_dtype="float16").facts
    assert (asked_for.dtype, asked_for.kv_dtype) == ("bfloat16", "float16")


@pytest.mark.skipif(library.choose().library is None, reason="no compiled kernels")
def test_auto_dtype_is_the_checkpoints_where_compiled_kernels_take_it(
    monkeypatch, folder, tmp_path
):
    monkeypatch.setattr(dtypes, "can_pack", lambda _: False)
    copy = _copy_with_config(folder, tmp_path, dtype="bfloat16")
    facts = load_runner(copy, device="cpu").facts
    assert (facts.dtype, facts.kv_dtype) == ("bfloat16", "bfloat16")
    # PyTorch would compute these.
    assert load_runner(copy, device="cpu", kv_dtype="fp8").facts.dtype == "float32"
    assert load_runner(copy, device="cpu", runner="transformers").facts.dtype == "float32"


def test_missing_folder_is_named(tmp_path):
    assert _reason(NotFoundError, model=str(tmp_path / "nothing")) == "MODEL_NOT_FOUND"
    assert _reason(NotFoundError, model="no-such-model") == "MODEL_NOT_FOUND"
    assert _reason(NotFoundError, model=str(tmp_path)) == "MODEL_NOT_FOUND"


def test_unknown_id_without_a_network_is_not_found(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert _reason(NotFoundError, model="nobody/no-such-model") == "MODEL_NOT_FOUND"


@pytest.mark.parametrize(
    "architectures", [["BertModel"], ["LlamaForSequenceClassification"], [], None]
)
def test_models_that_do_not_continue_text_are_refused(folder, tmp_path, architectures):
    copy = _copy_with_config(folder, tmp_path, architectures=architectures)
    assert _reason(InvalidRequestError, model=copy) == "MODEL_NOT_CAUSAL"


def test_encoder_decoders_are_refused(folder, tmp_path):
    copy = _copy_with_config(folder, tmp_path, is_encoder_decoder=True)
    assert _reason(InvalidRequestError, model=copy) == "MODEL_NOT_CAUSAL"


def test_models_without_the_attention_interface_are_refused(tmp_path):
    config = tiny_models.transformers.BloomConfig(
        vocab_size=32, hidden_size=32, n_layer=1, n_head=2
    )
    model = tiny_models.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert _reason(UnimplementedError, model=str(tmp_path)) == "MODEL_UNSUPPORTED"


@pytest.mark.parametrize(("family", "num_positions"), [("Phimoe", 512), ("Doge", 512), ("Doge", 9)])
def test_a_window_that_stands_in_a_mask_alone_is_refused(tmp_path, family, num_positions):
    config = getattr(tiny_models.transformers, f"{family}Config")(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=num_positions,
        sliding_window=9,
    )
    tiny_models.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    if num_positions > 9:
        assert _reason(UnimplementedError, model=str(tmp_path)) == "MODEL_UNSUPPORTED"
        return
    # Nobody can tell a window that is as long as the longest sequence.
    loaded = load_runner(str(tmp_path), device="cpu", dtype="float32")
    assert (loaded.facts.window_tokens, loaded.facts.num_kv_groups) == (0, 1)
    loaded.close()


def test_groups_of_layers_share_blocks_of_one_size_and_a_token_takes_one_in_each(tmp_path):
    folder = tiny_models.build("qwen2", tmp_path)
    loaded = load_runner(str(folder), device="cpu", dtype="float32")
    assert loaded.facts.group_windows == (0, 9, 9)
    # 3 layers, keys and values, 2 heads of 8 channels.
    assert loaded.facts.kv_bytes_per_token == 3 * 2 * 2 * 8 * 4
    loaded.allocate_pool(2, 16)
    assert loaded.block_bytes == 16 * loaded.facts.kv_bytes_per_token // 3
    loaded.warm_up()
    loaded.close()


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("runner", ["native", "transformers"])
def test_quantised_keys_and_values_are_counted_with_their_scales(folder, kv_dtype, dtype, runner):
    loaded = load_runner(str(folder), runner=runner, device="cpu", dtype=dtype, kv_dtype=kv_dtype)
    assert (loaded.facts.dtype, loaded.facts.kv_dtype) == (dtype, kv_dtype)
    # 3 layers, keys and values, 2 heads: 8 channels of one byte and a scale of four each.
    assert loaded.facts.kv_bytes_per_token == 3 * 2 * 2 * (8 + 4)
    loaded.allocate_pool(2, 16)
    assert loaded.block_bytes == 16 * loaded.facts.kv_bytes_per_token
    loaded.warm_up()
    loaded.close()


@pytest.mark.parametrize(
    "setting", [{"dtype": "int4"}, {"runner": "magic"}, {"kv_dtype": "float64"}, {"dtype": "int8"}]
)
def test_unknown_settings_are_refused(folder, setting):
    assert _reason(InvalidRequestError, model=str(folder), **setting) == "SETTING_INVALID"


def test_native_runner_says_why_it_cannot(tmp_path):
    gpt2 = tiny_models.build("gpt2", tmp_path)
    assert _reason(UnimplementedError, model=str(gpt2), runner="native") == "MODEL_NOT_NATIVE"


def test_damaged_folders_are_refused(folder, tmp_path):
    config = (folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    assert _reason(NotFoundError, model=str(tmp_path)) == "MODEL_WEIGHTS_NOT_FOUND"
    (tmp_path / "model.safetensors").write_bytes(b"no tensors here")
    assert _reason(InvalidRequestError, model=str(tmp_path)) == "MODEL_WEIGHTS_INVALID"
    (tmp_path / "config.json").write_text("not json")
    assert _reason(InvalidRequestError, model=str(tmp_path)) == "MODEL_CONFIG_INVALID"


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 4}, {"intermediate_size": 81}])
def test_weights_that_contradict_the_config_are_refused(folder, tmp_path, changes):
    copy = _copy_with_config(folder, tmp_path, **changes)
    assert _reason(InvalidRequestError, model=copy) == "MODEL_WEIGHTS_INVALID"


@pytest.mark.parametrize("runner", ["native", "transformers"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        # A layer too many, one too few, and a place of another size.
        ({"num_hidden_layers": 4}, "missing"),
        ({"num_hidden_layers": 2}, "config.json"),
        ({"intermediate_size": 81}, "shape"),
    ],
)
def test_each_way_to_contradict_the_config_is_said(folder, tmp_path, runner, changes, said):
    copy = _copy_with_config(folder, tmp_path, **changes)
    with pytest.raises(InvalidRequestError, match=said) as caught:
        load_runner(copy, device="cpu", dtype="float32", runner=runner)
    assert caught.value.reason == "MODEL_WEIGHTS_INVALID"


def test_tables_that_anybody_can_compute_are_no_weights_too_many(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    # The config says that the head is tied.
    weights["lm_head.weight"] = torch.zeros(tiny_models.VOCAB_SIZE, 48)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors")
    load_runner(str(tmp_path), device="cpu", runner="native").close()


def test_weights_too_large_for_memory_are_refused_before_reading(folder, monkeypatch):
    monkeypatch.setattr(load_checks, "available_memory_bytes", lambda: 1000)
    assert _reason(ResourceExhaustedError, model=str(folder)) == "MODEL_TOO_LARGE"


def test_a_gpu_too_small_for_weights_and_one_sequence_says_how_much_is_missing(folder, monkeypatch):
    config = read_config(folder)
    file_bytes = (folder / "model.safetensors").stat().st_size
    # 3 layers, keys and values, 2 heads of 8 channels, two bytes each.
    sequence_bytes = load_checks.SEQUENCE_TOKENS_MIN * 3 * 2 * 2 * 8 * 2
    needed_bytes = file_bytes // 2 + sequence_bytes
    left_bytes = needed_bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (left_bytes, 80 << 30))

    def check():
        load_checks.check_memory(
            folder,
            config,
            device=torch.device("cuda", 0),
            dtype=torch.bfloat16,
            kv_dtype=torch.bfloat16,
        )

    check()
    left_bytes -= 1
    with pytest.raises(ResourceExhaustedError, match="cuda:0 has") as caught:
        check()
    assert caught.value.reason == "MODEL_TOO_LARGE"
    assert caught.value.limits["missing_bytes"] == "1"
    assert caught.value.limits["needed_bytes"] == str(needed_bytes)


@pytest.mark.parametrize(
    ("capability", "kv_dtype", "is_refused"),
    [
        ((8, 0), torch.float8_e4m3fn, True),
        ((8, 6), torch.float8_e4m3fn, True),
        ((8, 9), torch.float8_e4m3fn, False),
        ((10, 0), torch.float8_e4m3fn, False),
        ((8, 0), torch.int8, False),
    ],
)
def test_a_type_that_the_chip_cannot_convert_is_refused(
    monkeypatch, capability, kv_dtype, is_refused
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    if not is_refused:
        load_checks.check_kv_dtype(torch.device("cuda", 0), kv_dtype)
        return
    with pytest.raises(PreconditionError, match=r"needs compute capability 8\.9") as caught:
        load_checks.check_kv_dtype(torch.device("cuda", 0), kv_dtype)
    assert caught.value.reason == "DTYPE_UNSUPPORTED"
    # A CPU converts anything.
    load_checks.check_kv_dtype(torch.device("cpu"), kv_dtype)


@pytest.mark.skipif(library.choose().library is None, reason="no compiled kernels")
def test_determinism_is_promised_where_compiled_kernels_compute(folder):
    for kv_dtype in ("auto", "int8"):
        runner = load_runner(
            str(folder), device="cpu", dtype="bfloat16", kv_dtype=kv_dtype, is_deterministic=True
        )
        assert runner.facts.kernels.startswith("fused")
        runner.close()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"cpu_kernels": "torch"}, "asked for by cpu-kernels=torch"),
        ({"runner": "transformers"}, "transformers"),
        ({"kv_dtype": "fp8"}, "float8"),
    ],
)
def test_determinism_is_refused_where_pytorch_would_compute(folder, settings, why):
    with pytest.raises(PreconditionError, match=why) as caught:
        load_runner(str(folder), device="cpu", is_deterministic=True, **settings)
    assert caught.value.reason == "DETERMINISM_UNAVAILABLE"


def test_determinism_is_refused_to_falcon_and_on_gpus(tmp_path):
    folder = tiny_models.build("falcon-7b", tmp_path)
    with pytest.raises(PreconditionError, match="no kernels for falcon models"):
        load_runner(str(folder), device="cpu", is_deterministic=True)
    request = NativeRequest(
        folder=folder,
        config=parse_decoder_config(read_config(folder)),
        dtype=torch.bfloat16,
        kv_dtype=torch.bfloat16,
        device=torch.device("cuda", 0),
        cpu_kernels="auto",
        is_deterministic=True,
        progress=lambda *_: None,
    )
    with pytest.raises(PreconditionError, match="products on cuda:0"):
        load_native(request)


def test_eos_tokens_come_from_the_generation_config_first(tmp_path):
    assert eos_token_ids(tmp_path, {"eos_token_id": 7}) == (7,)
    assert eos_token_ids(tmp_path, {}) == ()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert eos_token_ids(tmp_path, {"eos_token_id": 7}) == (3, 4)


def test_cpu_is_chosen_where_there_is_no_gpu(tmp_path):
    assert choose_device("auto", tmp_path) == torch.device("cpu")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_gpu_that_cannot_be_used_is_an_error_in_the_drivers_words(monkeypatch, tmp_path, wanted):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()

    def refuse():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(device_module.torch.cuda, "init", refuse)
    with pytest.raises(PreconditionError, match=r"too old \(found version 11040") as caught:
        choose_device(wanted, tmp_path)
    assert caught.value.reason == "DEVICE_UNAVAILABLE"


def test_unknown_device_is_refused(folder):
    assert _reason(InvalidRequestError, model=str(folder), device="tpu") == "DEVICE_UNKNOWN"
