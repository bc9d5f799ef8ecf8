"""Which files hold a model's weights, and whether those files are whole. Reads headers only; never a pickle, never a tensor.

A safetensors file is: u64 little-endian length of the header, the header as JSON ({name: {dtype, shape, data_offsets}}), then the tensors'
bytes end to end. (Format: https://github.com/huggingface/safetensors.)
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from stillroom.core.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What trainers leave beside a model: pickles, but no weights.
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state")
_LONGEST_HEADER_BYTES = 100_000_000
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def find_weights(directory: Path) -> list[Path]:
    """The safetensors files that `transformers` would load from `directory`, by name, each checked to be whole.

    Raises ModelError: 'model-no-weights', 'model-pickle' (only pickles are there), 'model-corrupt' (an index without its shards, a file that
    is cut off or whose header does not describe it).
    """
    if (directory / SINGLE).is_file():
        files = [directory / SINGLE]
        check_safetensors(files[0])
        return files
    if (directory / INDEX).is_file():
        return _sharded(directory)
    raise _no_weights(directory)


def stored_dtype(files: list[Path]) -> str:
    """The dtype, as safetensors names it, that most of the files' numbers are stored in."""
    numbers: Counter[str] = Counter()
    for file in files:
        for entry in check_safetensors(file).values():
            numbers[entry["dtype"]] += math.prod(entry["shape"])
    return numbers.most_common(1)[0][0]


def check_safetensors(file: Path) -> dict[str, dict[str, Any]]:
    """The file's tensors by name ({dtype, shape, data_offsets}), if they fill the file exactly; else ModelError 'model-corrupt'."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER_BYTES):
                raise _corrupt(file, f"{file} ({size} bytes) announces a header of {length} bytes, more than it holds")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise _corrupt(file, f"{file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise _corrupt(file, f"{file}, whose header is not JSON") from error
    if not isinstance(header, dict):
        raise _corrupt(file, f"{file}, whose header is not a JSON object")
    header.pop("__metadata__", None)
    _check_extents(file, header, size - 8 - length)
    return header


def _check_extents(file: Path, tensors: dict[str, Any], data_bytes: int) -> None:
    """Every tensor as long as its shape says, all of them end to end, up to the end of the file."""
    extents = []
    for name, entry in tensors.items():
        try:
            start, stop = (int(offset) for offset in entry["data_offsets"])
            numbers = math.prod(int(side) for side in entry["shape"])
            bits = _BITS[entry["dtype"]]
        except (KeyError, TypeError, ValueError) as error:
            raise _corrupt(file, f"{file}, whose header describes the tensor {name!r} in a way that cannot be read") from error
        if (stop - start) * 8 != numbers * bits or numbers < 0:
            raise _corrupt(file, f"{file}, whose tensor {name!r} has {stop - start} bytes for a shape of {entry['shape']} in {entry['dtype']}")
        extents.append((start, stop))
    reached = 0
    for start, stop in sorted(extents):
        if start != reached:
            raise _corrupt(file, f"{file}, whose tensors overlap or leave gaps at byte {reached}")
        reached = stop
    if reached != data_bytes:
        raise _corrupt(file, f"{file}, which holds {data_bytes} bytes of tensors where its header describes {reached}")


def _sharded(directory: Path) -> list[Path]:
    index = directory / INDEX
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        tensors = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(index, f"{index}, which is not an index of shards") from error
    names = sorted(set(tensors.values()))
    if not names:
        raise _corrupt(index, f"{index}, which names no shard")
    held: dict[str, dict[str, dict[str, Any]]] = {}
    for shard in names:
        # A shard is a file beside its index: a path would lead out of the directory.
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise _corrupt(index, f"{index}, which names {shard!r} as a shard")
        if not (directory / shard).is_file():
            raise _corrupt(index, f"{index}, whose shard {shard} is not there")
        held[shard] = check_safetensors(directory / shard)
    for name, shard in tensors.items():
        if name not in held[shard]:
            raise _corrupt(directory / shard, f"{directory / shard}, which lacks the tensor {name!r} that its index looks for there")
    return [directory / shard for shard in names]


def _no_weights(directory: Path) -> ModelError:
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith(_PICKLES) and not name.startswith(_NOT_WEIGHTS)]
    if pickles:
        return ModelError(
            "model-pickle",
            found=f"{directory} with {', '.join(pickles[:3])}{' and more' if len(pickles) > 3 else ''}, and no {SINGLE}",
            expected=f"{SINGLE}, or {INDEX} with its shards",
            why="unpickling runs whatever code the file contains",
            do="Convert it where you trust it: load it there with transformers and write it again with model.save_pretrained(DIRECTORY).",
        )
    return ModelError(
        "model-no-weights",
        found=f"{directory} with {', '.join(names[:6]) or 'no files'}{' and more' if len(names) > 6 else ''}",
        expected=f"{SINGLE}, or {INDEX} with its shards",
        do="Copy the weights there, or point to the directory that has them.",
    )


def _corrupt(file: Path, found: str) -> ModelError:
    return ModelError(
        "model-corrupt",
        found=found,
        expected="a whole safetensors file" if file.suffix == ".safetensors" else "an index whose shards are all there",
        do=f"Fetch or copy {file.name} again, and compare its size with the original's.",
    )
