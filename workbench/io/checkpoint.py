"""Reading safetensors checkpoints: what the headers promise, the tensors in small pieces, and the chat template.

Nothing here knows a model. Headers are read and checked before any tensor is, and pickles are never opened.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from workbench.errors import CheckpointError
from workbench.io.permissions import check_readable

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

PIECE_BYTES = 4 * 2**20
PIECE_SHARE = 1 / 64
MAX_LISTED = 12


class StoredTensor(NamedTuple):
    """What a shard's header says of one tensor; `dtype` is safetensors' name for it (BF16, F32, I8 ...)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * FLOAT_DTYPES[self.dtype].itemsize


def raise_problems(what: object, expected: str, problems: list[str], advice: str) -> NoReturn:
    """One CheckpointError that lists the problems, the first dozen by name and the rest as a count."""
    listed = [f"\n  {problem}" for problem in problems[:MAX_LISTED]]
    more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    plural = "problem" if len(problems) == 1 else "problems"
    raise CheckpointError(
        f"{what}: expected {expected}, got {len(problems)} {plural}:{''.join(listed)}{more}\n{advice}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing, unreadable or something else.

    Unreadable is also one that gives a key twice, of which readers take the last, or that is nested too deeply.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a file, got none. Give a complete checkpoint directory.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected readable JSON, got {error}. Download or write it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, got {type(value).__name__}. Download or write it again."
        )
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in found if names.count(name) > 1)!r} more than once")
    return found


def read_template(directory: Path) -> str | None:
    """The chat template of a checkpoint: its own file, else where transformers 4 wrote it, in tokenizer_config.json.

    None when there is neither. Raises CheckpointError for one that is no text, as where several have names.
    """
    path, config = directory / TEMPLATE_FILE, directory / "tokenizer_config.json"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: expected UTF-8 text, got {error}. Download or write it again.") from None
    template = read_json(config).get("chat_template") if config.is_file() else None
    if not isinstance(template, str | None):
        raise CheckpointError(
            f"{config}: expected chat_template to be one text, got {type(template).__name__}. "
            f"Put the one to use into {TEMPLATE_FILE}."
        )
    return template


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor that the checkpoint's shards hold, by name.

    Raises CheckpointError for a missing, truncated or corrupt shard, for an index that disagrees with the shards, for
    safetensors files that belong to neither, and for a directory without any.
    """
    has_index, has_single = (directory / INDEX_FILE).is_file(), (directory / SINGLE_FILE).is_file()
    if has_index and has_single:
        raise CheckpointError(
            f"{directory}: expected {SINGLE_FILE} or {INDEX_FILE}, got both. Remove the one that is out of date."
        )
    if has_index:
        return _read_indexed(directory)
    if has_single:
        strays = _shards_beside(directory, {SINGLE_FILE})
        if strays:
            raise CheckpointError(
                f"{directory}: expected {SINGLE_FILE} alone, got {', '.join(strays)} beside it. "
                "Remove what is no part of the checkpoint, or add the index of its shards."
            )
        return dict(_read_header(directory / SINGLE_FILE))
    if any(directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{directory}: expected {SINGLE_FILE} or {INDEX_FILE}, got other safetensors files only. "
            "Add the index of these shards."
        )
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        raise CheckpointError(
            f"{directory}: expected safetensors, got a pickle. A pickle can run code and is never read; "
            "convert it to safetensors."
        )
    raise CheckpointError(f"{directory}: expected {SINGLE_FILE}, got no weights. Give a complete checkpoint directory.")


def _shards_beside(directory: Path, known: Collection[str]) -> list[str]:
    return sorted(file.name for file in directory.glob("*.safetensors") if file.name not in known)


def _read_indexed(directory: Path) -> dict[str, StoredTensor]:
    index = read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise CheckpointError(
            f"{directory / INDEX_FILE}: expected a weight_map of names to files, got none. Write it again."
        )
    shards = sorted(set(index.values()))
    problems = [f"{file}: lies beside the index, which does not name it" for file in _shards_beside(directory, shards)]
    there = {file.name for file in directory.glob("*.safetensors") if file.is_file()}
    found: dict[str, StoredTensor] = {}
    for file in shards:
        if Path(file).name != file or not file.endswith(".safetensors"):
            problems.append(f"{file}: the index names it, but a shard is a .safetensors file beside the index")
        elif file not in there:
            problems.append(f"{file}: the index names it, but there is no such file")
        else:
            found.update(_checked_against_index(directory / file, index, problems))
    absent = [name for name in index if name not in found and index[name] in there]
    problems += [f"{name}: the index places it in {index[name]}, which does not hold it" for name in absent]
    if problems:
        raise_problems(
            directory, "shards that agree with their index", problems, "Download or write the checkpoint again."
        )
    return found


def _checked_against_index(
    shard: Path, index: Mapping[str, str], problems: list[str]
) -> Iterator[tuple[str, StoredTensor]]:
    for name, tensor in _read_header(shard):
        if index.get(name) == shard.name:
            yield name, tensor
        elif name in index:
            problems.append(f"{name}: {shard.name} holds it, but the index places it in {index[name]}")
        else:
            problems.append(f"{name}: {shard.name} holds it, but the index does not list it")


def _read_header(shard: Path) -> list[tuple[str, StoredTensor]]:
    try:
        check_readable(shard)
        with safe_open(shard, framework="pt") as file:
            views = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118 (not a dict)
            return [(name, StoredTensor(shard, tuple(view.get_shape()), view.get_dtype())) for name, view in views]
    except OSError as error:
        raise CheckpointError(
            f"{shard}: expected a readable file, got {error.strerror or error}. Make it readable."
        ) from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{shard}: expected a whole safetensors file, got {error}. It is truncated or corrupt; download it again."
        ) from None


def stream(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, slice, torch.Tensor]]:
    """The tensors file by file, in pieces: (name, rows, piece), where `piece` is `tensor[rows]` on the CPU.

    Pieces are read into one buffer, which is a PIECE_SHARE of all bytes and at least PIECE_BYTES (more only if one row
    is longer): copy out of a piece before asking for the next one. Read, not mapped: how much of a mapped file counts
    as this process's memory is the kernel's choice.
    """
    size = max(PIECE_BYTES, int(PIECE_SHARE * sum(tensor.n_bytes for tensor in tensors.values())))
    buffer = bytearray(max([size, *(tensor.n_bytes // tensor.shape[0] for tensor in tensors.values())]))
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        by_file[tensor.file].append(name)
    for shard, names in by_file.items():
        with shard.open("rb", buffering=0) as file:
            offsets = _data_offsets(file)
            for name in sorted(names, key=offsets.__getitem__):
                yield from _pieces(file, offsets[name], name, tensors[name], buffer)


def _data_offsets(file: BinaryIO) -> dict[str, int]:
    """Where each tensor's bytes begin: eight bytes give the length of a JSON header, offsets count from its end."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _pieces(
    file: BinaryIO, offset: int, name: str, tensor: StoredTensor, buffer: bytearray
) -> Iterator[tuple[str, slice, torch.Tensor]]:
    n_rows, dtype = tensor.shape[0], FLOAT_DTYPES[tensor.dtype]
    row_bytes = tensor.n_bytes // n_rows
    step = len(buffer) // row_bytes
    file.seek(offset)
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        _read_exactly(file, memoryview(buffer)[: (stop - start) * row_bytes], tensor.file)
        n_values = (stop - start) * row_bytes // dtype.itemsize
        piece = torch.frombuffer(buffer, dtype=dtype, count=n_values).view(stop - start, *tensor.shape[1:])
        yield name, slice(start, stop), piece


def _read_exactly(file: BinaryIO, view: memoryview, shard: Path) -> None:
    filled = 0
    while filled < len(view):  # one read returns 2 GB at most
        n_bytes = file.readinto(view[filled:])  # type: ignore[attr-defined]
        if not n_bytes:
            raise CheckpointError(f"{shard}: expected {len(view)} more bytes, got {filled}. Download it again.")
        filled += n_bytes
