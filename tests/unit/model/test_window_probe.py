"""Windows in ``ModelFacts`` are what every layer asks for, however a config puts it."""

import json

import pytest

from exactness import tiny_models
from pageframe.executor.model.loader import load_runner


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = tiny_models.build(name, tmp_path_factory.mktemp("model") / name)
        return made[name]

    return get


def _window(folder, runner):
    loaded = load_runner(str(folder), runner=runner, device="cpu", dtype="float32")
    assert loaded.facts.runner == runner
    window = loaded.facts.window_tokens
    loaded.close()
    return window


def _changed(folder, target, **changes):
    """The same weights under another config; None takes a key away."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    return target


@pytest.mark.parametrize("runner", ["native", "transformers"])
@pytest.mark.parametrize(("name", "window"), [("mistral", 11), ("llama", 0)])
def test_one_window_in_all_layers_is_the_models(folder_of, name, window, runner):
    assert _window(folder_of(name), runner) == window


def test_families_without_a_native_form_are_seen_through_too(folder_of):
    assert _window(folder_of("mixtral"), "transformers") == 13
    assert _window(folder_of("gpt2"), "transformers") == 0


@pytest.mark.parametrize(
    ("name", "runner", "windows"),
    [
        # The first layer sees everything, the others nine positions.
        ("qwen2", "native", (0, 9, 9)),
        ("qwen2", "transformers", (0, 9, 9)),
        # Layers take turns; each third layer sees everything.
        ("gemma2", "transformers", (0, 13)),
        ("gemma3", "transformers", (0, 9, 9)),
    ],
)
def test_layers_that_differ_are_groups(folder_of, name, runner, windows):
    loaded = load_runner(str(folder_of(name)), runner=runner, device="cpu", dtype="float32")
    assert (loaded.facts.window_tokens, loaded.facts.group_windows) == (0, windows)
    loaded.close()


def test_a_module_may_keep_its_window_to_itself(tmp_path):
    config = tiny_models.transformers.Qwen2MoeConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    tiny_models.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded = load_runner(str(tmp_path), device="cpu", dtype="float32")
    assert loaded.facts.group_windows == (0, 9)
    loaded.close()


@pytest.mark.parametrize("runner", ["native", "transformers"])
def test_a_window_that_is_switched_off_counts_for_nothing(folder_of, tmp_path, runner):
    folder = _changed(
        folder_of("qwen2"), tmp_path, use_sliding_window=False, sliding_window=9, layer_types=None
    )
    assert _window(folder, runner) == 0


@pytest.mark.parametrize("runner", ["native", "transformers"])
@pytest.mark.parametrize("layer_types", [["sliding_attention"] * 3, None])
def test_a_window_in_every_layer_counts_however_it_is_said(
    folder_of, tmp_path, layer_types, runner
):
    folder = _changed(folder_of("qwen2"), tmp_path, layer_types=layer_types, max_window_layers=0)
    assert _window(folder, runner) == 9
