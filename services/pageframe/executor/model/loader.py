"""From a model's name to a ``ModelRunner``: finds the folder, checks it, chooses runner and types.

name ─▶ folder (or Hugging Face id) ─▶ config.json ─▶ device, dtype ─▶ fits into memory? ─▶
native if it is Llama-shaped, else transformers ─▶ facts, sampler ─▶ runner
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pageframe.core.errors import InvalidRequestError, NotFoundError, UnimplementedError
from pageframe.executor.batch import ModelFacts, ModelRunner
from pageframe.executor.model.announcing import Announce, announce_nothing, in_percent
from pageframe.executor.model.decoder import Decoder
from pageframe.executor.model.decoder_config import parse_decoder_config
from pageframe.executor.model.device import choose_device
from pageframe.executor.model.dtypes import (
    KV_DTYPES,
    checkpoint_dtype,
    choose_dtype,
    dtype_name,
    text_config,
)
from pageframe.executor.model.fused import FusedDecoder
from pageframe.executor.model.grammar_store import open_store
from pageframe.executor.model.layer_groups import LayerGroups, group_layers
from pageframe.executor.model.load_checks import (
    check_causal,
    check_kv_dtype,
    check_memory,
    check_settings,
)
from pageframe.executor.model.native import NativeDecoder
from pageframe.executor.model.native_choice import (
    NativeRequest,
    has_kernels,
    load_native,
    not_deterministic,
)
from pageframe.executor.model.runner import PagedRunner
from pageframe.executor.model.sampling_choice import SamplingRequest, choose_sampling
from pageframe.executor.model.sim import SimConfig, SimCost
from pageframe.executor.model.sim_device import SimDevice
from pageframe.executor.model.window_probe import probe_windows
from pageframe.executor.torch_import import complete_torch
from pageframe.kernels.cpu.library import AUTO, TORCH
from pageframe.kernels.layouts import QUANTISED_DTYPES, KvLayout

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_SIM_COST = SimCost(step_ns=2e6)
_NEEDED_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What was asked of the loader, resolved as far as the machine allows."""

    folder: Path
    config: Mapping[str, Any]
    name: str
    runner: str
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    cpu_kernels: str
    is_deterministic: bool
    has_graphs: bool
    announce: Announce


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model, the name of the runner that takes it, and what computes it."""

    decoder: Decoder
    runner_name: str
    kernels: str = ""


def load_runner(
    model: str,
    *,
    runner: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    kv_dtype: str = "auto",
    name: str = "",
    max_num_sequences: int = 256,
    max_step_tokens: int = 2048,
    num_threads: int = 0,
    cpu_kernels: str = AUTO,
    is_deterministic: bool = False,
    has_graphs: bool = True,
    sim_cost: SimCost = _SIM_COST,
    progress: Announce = announce_nothing,
) -> ModelRunner:
    """Load a model.

    Args:
        model: Folder in Hugging Face form, or a Hugging Face id; see ``resolve_folder``.
        runner: ``native``, ``transformers``, ``sim``, or ``auto``: native where it can.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: the checkpoint's, but float32
            on a CPU that has neither compiled kernels nor fast arithmetic for it.
        kv_dtype: The same three, ``fp8`` (e4m3), ``int8``, or ``auto``: the model's.
        name: Name to serve under; empty for the folder's name or the id.
        max_num_sequences: Rows of the sampler.
        max_step_tokens: Most tokens that one step will compute.
        num_threads: CPU threads for computing; 0 leaves it to PyTorch.
        cpu_kernels: Of the native runner on a CPU, one of ``kernels.cpu.library.CHOICES``.
        is_deterministic: Whether to refuse where a token could depend on the rest of its batch.
        has_graphs: Whether a GPU may record its decode steps as CUDA graphs.
        sim_cost: What steps of the ``sim`` runner cost.
        progress: Told how far loading is.

    Raises:
        NotFoundError: MODEL_NOT_FOUND or MODEL_WEIGHTS_NOT_FOUND.
        InvalidRequestError: MODEL_NOT_CAUSAL, MODEL_CONFIG_INVALID, MODEL_WEIGHTS_INVALID, or a
            setting that has no such value.
        UnimplementedError: MODEL_NOT_NATIVE, MODEL_UNSUPPORTED.
        PreconditionError: DEVICE_UNAVAILABLE, DTYPE_UNSUPPORTED, CPU_KERNELS_UNAVAILABLE,
            DETERMINISM_UNAVAILABLE.
        ResourceExhaustedError: MODEL_TOO_LARGE.
    """
    check_settings(runner=runner, kv_dtype=kv_dtype, dtype=dtype, cpu_kernels=cpu_kernels)
    if runner == "sim":
        return _load_sim(model, name, max_num_sequences, sim_cost)
    if num_threads:
        torch.set_num_threads(num_threads)
    chosen_device = choose_device(device)
    folder = resolve_folder(model)
    config = read_config(folder)
    check_causal(folder, config)
    native_kernels = cpu_kernels if runner != "transformers" else TORCH
    model_dtype = _choose_dtype(config, chosen_device, dtype, kv_dtype, native_kernels)
    request = _Request(
        folder=folder,
        config=config,
        name=name or _default_name(model),
        runner=runner,
        dtype=model_dtype,
        kv_dtype=model_dtype if kv_dtype == "auto" else KV_DTYPES[kv_dtype],
        device=chosen_device,
        cpu_kernels=cpu_kernels,
        is_deterministic=is_deterministic,
        has_graphs=has_graphs,
        announce=progress,
    )
    return _load(request, max_num_sequences, max_step_tokens)


def resolve_folder(model: str) -> Path:
    """The local folder of a model, downloading it if ``model`` is a Hugging Face id.

    What is in the cache is not downloaded. ``HF_HOME``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` are
    obeyed.

    Raises:
        NotFoundError: reason MODEL_NOT_FOUND.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    is_path = model.startswith((".", "~", os.sep)) or model.count("/") != 1
    if is_path:
        raise NotFoundError("MODEL_NOT_FOUND", f"model folder {model} does not exist", model=model)
    # Imported late: a folder on this machine needs no network library.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_NEEDED_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        why = str(error).strip().partition("\n")[0]
        raise NotFoundError(
            "MODEL_NOT_FOUND",
            f"{model} is neither a folder nor a Hugging Face model that can be had: {why}",
            model=model,
        ) from error


def read_config(folder: Path) -> Mapping[str, Any]:
    """The folder's ``config.json``.

    Raises:
        InvalidRequestError: reason MODEL_CONFIG_INVALID.
        NotFoundError: reason MODEL_NOT_FOUND; there is none.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise NotFoundError(
            "MODEL_NOT_FOUND", f"{folder} holds no config.json, so it is no model folder"
        )
    config = _read_json(path)
    if config is None:
        raise InvalidRequestError("MODEL_CONFIG_INVALID", f"{path} is not a JSON object")
    return config


def eos_token_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end a sequence: from the generation config, else from the config."""
    generation = _read_json(folder / "generation_config.json") or {}
    found = generation.get("eos_token_id", config.get("eos_token_id"))
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)


def _load_sim(model: str, name: str, max_num_sequences: int, cost: SimCost) -> ModelRunner:
    """A runner of no model, with the vocabulary and the limits of a real one."""
    folder = resolve_folder(model)
    config = read_config(folder)
    return SimDevice(
        SimConfig(
            name=name or _default_name(model),
            folder=str(folder),
            vocab_size=int(text_config(config)["vocab_size"]),
            max_model_len=_context_len(config),
            eos_token_ids=eos_token_ids(folder, config),
            max_num_rows=max_num_sequences,
            cost=cost,
        )
    )


def _load(request: _Request, max_num_sequences: int, max_step_tokens: int) -> ModelRunner:
    _check_device(request)
    loaded = _load_decoder(request)
    groups = _groups(request, loaded)
    facts, grammars = open_store(_facts(request, loaded, groups))
    sampler, on_device = choose_sampling(
        SamplingRequest(
            decoder=loaded.decoder,
            facts=facts,
            device=request.device,
            grammars=grammars,
            max_num_sequences=max_num_sequences,
            has_graphs=request.has_graphs,
            announce=request.announce,
        )
    )
    return PagedRunner(
        loaded.decoder,
        facts,
        sampler,
        request.device,
        request.kv_dtype,
        max_step_tokens=max_step_tokens,
        groups=groups,
        on_device=on_device,
    )


def _choose_dtype(
    config: Mapping[str, Any], device: torch.device, wanted: str, kv_dtype: str, cpu_kernels: str
) -> torch.dtype:
    """What weights are computed with; see ``choose_dtype``."""
    stored = checkpoint_dtype(config)
    stored_kv = KV_DTYPES.get(kv_dtype, stored)
    is_fused = has_kernels(config, stored, stored_kv, device, cpu_kernels)
    return choose_dtype(wanted, stored, device, has_kernels=is_fused)


def _check_device(request: _Request) -> None:
    """Refuse what the device cannot compute or hold."""
    check_kv_dtype(request.device, request.kv_dtype)
    check_memory(
        request.folder,
        request.config,
        device=request.device,
        dtype=request.dtype,
        kv_dtype=request.kv_dtype,
    )


def _load_decoder(request: _Request) -> _Loaded:
    if request.runner != "transformers":
        try:
            config = parse_decoder_config(request.config)
        except UnimplementedError:
            if request.runner == "native":
                raise
        else:
            decoder, kernels = load_native(
                NativeRequest(
                    folder=request.folder,
                    config=config,
                    dtype=request.dtype,
                    kv_dtype=request.kv_dtype,
                    device=request.device,
                    cpu_kernels=request.cpu_kernels,
                    is_deterministic=request.is_deterministic,
                    progress=in_percent(request.announce),
                )
            )
            return _Loaded(decoder, "native", kernels)
    if request.is_deterministic:
        raise not_deterministic("the transformers runner computes with PyTorch")
    # Models of others are made on the meta device, and filled with weights then.
    complete_torch()
    # Imported late: the import takes seconds, and the native runner does without.
    from pageframe.executor.model.transformers_runner import TransformersDecoder

    return _Loaded(
        TransformersDecoder(
            request.folder, request.dtype, request.device, in_percent(request.announce)
        ),
        "transformers",
    )


def _groups(request: _Request, loaded: _Loaded) -> LayerGroups:
    """Which layers share a block. A window that no sequence outgrows is none."""
    decoder, max_model_len = loaded.decoder, _max_model_len(request.config, loaded.runner_name)
    # Native ones have their windows from the config, and not all of them ask for ``attend``.
    if isinstance(decoder, FusedDecoder | NativeDecoder):
        windows = decoder.windows
    else:
        windows = probe_windows(decoder, request.device)
    return group_layers([window if window < max_model_len else 0 for window in windows])


def _facts(request: _Request, loaded: _Loaded, groups: LayerGroups) -> ModelFacts:
    shape, is_mixed = loaded.decoder.kv_shape, len(groups.windows) > 1
    layout = KvLayout(
        num_layers=groups.num_layers,
        block_size=1,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=request.kv_dtype,
        is_quantised=request.kv_dtype in QUANTISED_DTYPES,
    )
    return ModelFacts(
        name=request.name,
        folder=str(request.folder),
        vocab_size=int(text_config(request.config)["vocab_size"]),
        max_model_len=_max_model_len(request.config, loaded.runner_name),
        eos_token_ids=eos_token_ids(request.folder, request.config),
        kv_bytes_per_token=layout.kv_bytes_per_token,
        device=str(request.device),
        dtype=dtype_name(request.dtype),
        kv_dtype=dtype_name(request.kv_dtype),
        runner=loaded.runner_name,
        kernels=loaded.kernels,
        window_tokens=0 if is_mixed else groups.windows[0],
        group_windows=groups.windows if is_mixed else (),
    )


def _max_model_len(config: Mapping[str, Any], runner_name: str) -> int:
    if runner_name == "native":
        return parse_decoder_config(config).max_model_len
    return _context_len(config)


def _context_len(config: Mapping[str, Any]) -> int:
    text = text_config(config)
    for key in _CONTEXT_KEYS:
        if isinstance(text.get(key), int):
            return int(text[key])
    raise InvalidRequestError(
        "MODEL_CONFIG_INVALID",
        f"config.json names no context length (one of {', '.join(_CONTEXT_KEYS)})",
    )


def _default_name(model: str) -> str:
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        parsed = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return parsed if isinstance(parsed, dict) else None
