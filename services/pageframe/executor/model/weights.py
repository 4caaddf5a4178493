"""Reads tensors of a Hugging Face folder from safetensors files, in the wanted dtype."""

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from pageframe.core.errors import InvalidRequestError, NotFoundError

Progress = Callable[[int, int], None]
"""Told bytes read so far and bytes in all, as they stand in the files."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one.

    Raises:
        NotFoundError: reason MODEL_WEIGHTS_NOT_FOUND.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise NotFoundError("MODEL_WEIGHTS_NOT_FOUND", f"{file} does not exist", file=str(file))
    return files


NEVER_MISSED = (".rotary_emb.inv_freq", "lm_head.weight")
"""Ends of names of what checkpoints hold beside weights that count: tables that anybody can
compute, and the copy of a tied head."""


class WeightReader:
    """Tensors by name, converted and moved as they are read; a context manager.

    Whoever opens one reads all of it: at the end, a tensor that nobody asked for is an error, for
    it would mean that the config is of another model.

    Args:
        folder: Hugging Face folder.
        dtype: What tensors are converted to.
        device: Where they go.
        progress: Told how far reading is.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, progress: Progress
    ) -> None:
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._files = weight_files(folder)
        self._num_bytes_total = sum(file.stat().st_size for file in self._files)
        self._num_bytes_read = 0
        self._open_files = ExitStack()
        self._file_of: dict[str, Any] = {}
        self._unread: set[str] = set()

    def __enter__(self) -> Self:
        for file in self._files:
            try:
                opened = self._open_files.enter_context(safe_open(str(file), framework="pt"))
            except SafetensorError as error:
                raise InvalidRequestError(
                    "MODEL_WEIGHTS_INVALID", f"{file} is no safetensors file: {error}"
                ) from error
            self._file_of.update(dict.fromkeys(opened.keys(), opened))
        self._unread = {name for name in self._file_of if not name.endswith(NEVER_MISSED)}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file_of.clear()
        self._open_files.close()
        if kind is None and self._unread:
            raise InvalidRequestError(
                "MODEL_WEIGHTS_INVALID",
                f"config.json knows nothing of {len(self._unread)} tensors of the checkpoint, "
                f"{min(self._unread)} among them",
                num_tensors=len(self._unread),
            )

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor ``name``.

        Raises:
            InvalidRequestError: reason MODEL_WEIGHTS_INVALID; it is missing or of another shape.
        """
        return self.read_stacked([name], *shape)

    def borrow(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor ``name`` as it lies in its file, where its dtype is the wanted one.

        Nothing is copied: pages of the file come in when somebody looks at them. Valid while the
        reader is open. In another dtype, or on another device, it is a copy, as of ``read``.

        Raises:
            InvalidRequestError: as ``read``.
        """
        stored = self._file_of[name].get_tensor(name) if name in self else None
        if stored is None or stored.shape != shape or not self._is_as_wanted(stored):
            return self.read(name, *shape)
        self._unread.discard(name)
        self._count(stored)
        return stored

    def read_stacked(self, names: Iterable[str], *shape: int) -> torch.Tensor:
        """Several tensors, one below the other along the first dimension, which sum to ``shape``.

        Each part goes straight to its place, so that a large one is never held twice.
        """
        whole = torch.empty(shape, dtype=self._dtype, device=self._device)
        filled = 0
        for name in names:
            if name not in self._file_of:
                raise InvalidRequestError("MODEL_WEIGHTS_INVALID", f"tensor {name} is missing")
            part = self._file_of[name].get_tensor(name)
            self._unread.discard(name)
            if part.shape[1:] != whole.shape[1:] or filled + part.shape[0] > shape[0]:
                raise self._wrong_shape(name, tuple(part.shape), shape)
            whole[filled : filled + part.shape[0]] = part
            filled += part.shape[0]
            self._count(part)
        if filled != shape[0]:
            raise self._wrong_shape(name, (filled, *shape[1:]), shape)
        return whole

    def _is_as_wanted(self, stored: torch.Tensor) -> bool:
        is_aligned = stored.data_ptr() % stored.element_size() == 0
        return is_aligned and (stored.dtype, stored.device) == (self._dtype, self._device)

    def _count(self, part: torch.Tensor) -> None:
        self._num_bytes_read += part.numel() * part.element_size()
        self._progress(self._num_bytes_read, self._num_bytes_total)

    def _wrong_shape(
        self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]
    ) -> InvalidRequestError:
        return InvalidRequestError(
            "MODEL_WEIGHTS_INVALID",
            f"tensor {name} has shape {found}, which does not fit {wanted} of config.json",
        )
