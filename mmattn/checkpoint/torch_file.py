"""Files of ``torch.save``: zip archives (torch 1.6 and later) and the sequence of pickles before.

Tensors are mapped where the file stores their numbers as they are in memory; the rest is read.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .errors import CheckpointError
from .pickled import Described, PlainUnpickler, Storage, UnknownName, resolve

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
# Above so many bytes, a part of a compressed file that is more than so many times smaller there.
MAX_INFLATED, MAX_RATIO = 2**24, 200

Find = Callable[[Storage], torch.UntypedStorage]


def read_torch_file(path: Path) -> Any:
    """Content of a file, tensors on the CPU; what it names beside plain data is refused.

    Raises:
        CheckpointError: the file is damaged, or holds more than tensors and plain values.
    """
    try:
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except CheckpointError:
        raise
    except UnknownName as error:
        raise CheckpointError(
            f'{path} holds more than tensors and plain values ({error}), and reading that would '
            'execute code from the file; if you trust it, save its weights alone: '
            'torch.save(torch.load(file, weights_only=False)["state_dict"], new_file)'
        ) from None
    except Exception as error:  # whatever a damaged pickle leads to
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f'{path} is damaged or cut short: {reason[0] if reason else type(error).__name__}'
        ) from None


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in parts if name.rpartition('/')[2] == 'data.pkl']
        if len(pickles) != 1 or len(parts) != len(archive.infolist()):
            raise CheckpointError(f'{path} is a zip archive, but not of torch.save')
        root = pickles[0].removesuffix('data.pkl')
        if f'{root}constants.pkl' in parts:
            raise CheckpointError(f'{path} is a TorchScript program, not a file of weights')
        for name, info in parts.items():
            if info.file_size > max(MAX_INFLATED, MAX_RATIO * info.compress_size):
                raise CheckpointError(f'{path}: {name} would take {info.file_size} bytes')
        if damaged := archive.testzip():
            raise CheckpointError(f'{path} is damaged: the checksum of {damaged} does not agree')
        if f'{root}byteorder' in parts and archive.read(f'{root}byteorder') != b'little':
            raise CheckpointError(f'{path} was written on a machine of another byte order')
        content = PlainUnpickler(io.BytesIO(archive.read(pickles[0])), encoding='utf-8').load()
        mapped = _map(path)

        def find(storage: Storage) -> torch.UntypedStorage:
            info = parts[f'{root}data/{storage.key}']
            if info.compress_type != zipfile.ZIP_STORED:
                return _copied(archive.read(info))
            # The local header repeats the name, and has extra fields of its own.
            header = bytes(mapped[info.header_offset : info.header_offset + 30])
            start = info.header_offset + 30 + sum(struct.unpack('<HH', header[26:]))
            return cast(torch.UntypedStorage, mapped[start : start + info.file_size])

        return _materialize(path, content, find)


def _read_legacy(path: Path) -> Any:
    """Five pickles (magic number, protocol, sizes, content, keys), then each storage's numbers."""
    with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[257:262] == b'ustar':
            raise CheckpointError(f'{path} is a tar archive, as of torch before 0.1.10')

        def load() -> Any:
            return PlainUnpickler(data, encoding='utf-8').load()

        if load() != LEGACY_MAGIC or load() != LEGACY_PROTOCOL:
            raise ValueError('no file of torch')
        sizes = load()
        if not sizes.get('little_endian', True):
            raise CheckpointError(f'{path} was written on a machine of another byte order')
        content, keys = load(), load()
        wanted = _dtypes(content)
        places: dict[str, tuple[int, int]] = {}
        position = data.tell()
        for key in keys:
            (count,) = struct.unpack('<q', data[position : position + 8])
            size = count * wanted.get(str(key), torch.uint8).itemsize
            if not 0 <= count <= len(data) or position + 8 + size > len(data):
                raise ValueError(f'storage {key} ends behind the file')
            places[str(key)] = (position + 8, size)
            position += 8 + size

        def find(storage: Storage) -> torch.UntypedStorage:
            start, size = places[storage.key]
            return _copied(memoryview(data)[start : start + size])

        return _materialize(path, content, find)


def _dtypes(content: Any) -> dict[str, torch.dtype]:
    """Dtype of each storage that the content refers to."""
    found: dict[str, torch.dtype] = {}

    def note(tensor: Described) -> None:
        found[tensor.storage.key] = tensor.storage.dtype

    resolve(content, note)
    return found


def _materialize(path: Path, content: Any, find: Find) -> Any:
    storages: dict[str, torch.UntypedStorage] = {}

    def make(tensor: Described) -> Tensor:
        storage = tensor.storage
        if storage.key not in storages:
            storages[storage.key] = find(storage)
        return _tensor(tensor, storages[storage.key])

    return resolve(content, make)


def _tensor(tensor: Described, numbers: torch.UntypedStorage) -> Tensor:
    storage, size, stride = tensor.storage, tensor.size, tensor.stride
    offset, itemsize = storage.start + tensor.offset, tensor.dtype.itemsize
    count = prod(size)
    if len(size) != len(stride):
        raise ValueError(f'a tensor of size {size} and stride {stride}')
    expected = storage.length * storage.dtype.itemsize
    if len(numbers) < expected or (not storage.start and len(numbers) != expected):
        raise ValueError(f'storage {storage.key} has {len(numbers)} bytes for {storage.length}')
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if count and (last >= len(numbers) // itemsize or count > len(numbers) // itemsize):
        raise ValueError(f'a tensor {size} has more elements than its storage')
    if numbers.data_ptr() % itemsize:  # of an archive that a zip tool wrote
        numbers = numbers.clone()
    return torch.empty(0, dtype=tensor.dtype).set_(numbers, offset, size, stride)


def _map(path: Path) -> torch.UntypedStorage:
    numbers = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    return cast(torch.UntypedStorage, numbers)


def _copied(content: bytes | memoryview) -> torch.UntypedStorage:
    if not content:
        return torch.UntypedStorage(0)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage()
