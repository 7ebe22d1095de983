"""Pickles of ``torch.save``, read as plain data: nothing in them is executed.

An unpickler asks for the objects that a pickle names and calls them. Here it gets stand-ins that
make numbers, strings, containers, and descriptions of tensors; they take no memory, lengths or
attributes from the file that are not checked, and nothing outside the result changes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch

NUMPY_DTYPES = {'f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1'}
STORAGE_DTYPES = {
    'DoubleStorage': torch.float64,
    'FloatStorage': torch.float32,
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'LongStorage': torch.int64,
    'IntStorage': torch.int32,
    'ShortStorage': torch.int16,
    'CharStorage': torch.int8,
    'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
    'ComplexFloatStorage': torch.complex64,
    'ComplexDoubleStorage': torch.complex128,
    'UntypedStorage': torch.uint8,
}
MAX_DEPTH = 100


class UnknownName(Exception):
    """A pickle names an object that has no stand-in."""


class Unreadable(NamedTuple):
    """A tensor without plain numbers, such as a sparse one."""

    what: str


class Storage(NamedTuple):
    """Numbers of tensors, by the key under which the file has them.

    Attributes:
        key: in the file.
        dtype: of the numbers.
        length: how many there are.
        start: first of them; storages of torch before 0.4 may be parts of others.
    """

    key: str
    dtype: torch.dtype
    length: int
    start: int = 0


class Described(NamedTuple):
    """A tensor: its place in a storage, in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Log(NamedTuple):
    """State of mmengine's HistoryBuffer."""

    values: np.ndarray
    counts: np.ndarray
    max_length: int


# ----------------------------------------------------------------------------------- stand-ins


class _Call(NamedTuple):
    """A function that a pickle may call; unlike a function, it can be given no attributes."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class _StorageType(NamedTuple):
    dtype: torch.dtype | None


class _Dict(dict):
    """Stand-in for dictionaries of all kinds, whose attributes are left out."""

    def __setstate__(self, state: object) -> None:
        """Forget the attributes."""


class _Namespace(dict):
    """Stand-in for objects that hold options as attributes."""

    def __setstate__(self, state: object) -> None:
        self.update(_checked(state, dict))


class _Log:
    state: dict

    def __setstate__(self, state: object) -> None:
        self.state = _checked(state, dict)


class _Dtype:
    """Stand-in for numpy's dtype: a number of fixed size."""

    def __init__(self, name: object, *_: object):
        if name not in NUMPY_DTYPES:
            raise ValueError(f'an array of dtype {name!r}')
        self.dtype = np.dtype(str(name))

    def __setstate__(self, state: object) -> None:
        order = _checked(state, tuple)[1]
        if order not in ('<', '|', '='):
            raise ValueError(f'an array of byte order {order!r}')


class _Array:
    """Stand-in for numpy's ndarray: as many bytes as its shape and dtype need."""

    value: np.ndarray

    def __setstate__(self, state: object) -> None:
        _, shape, dtype, is_fortran, data = _checked(state, tuple)
        self.value = _array(data, dtype, shape, 'F' if is_fortran else 'C')


def _array(data: object, dtype: object, shape: object, order: object = 'C') -> np.ndarray:
    kind, sides = _checked(dtype, _Dtype).dtype, _sizes(shape)
    content = bytes(data) if isinstance(data, (bytes, bytearray)) else _checked(data, bytes)
    if len(content) != prod(sides) * kind.itemsize:
        raise ValueError(f'an array {sides} of {kind} in {len(content)} bytes')
    flat = np.frombuffer(content, kind).copy()
    return flat.reshape(sides, order='F' if order == 'F' else 'C')


def _frombuffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.value = _array(data, dtype, shape, order)
    return array


def _scalar(dtype: object, data: object) -> Any:
    return _array(data, dtype, ()).item()


def _tensor(storage: object, offset: object, size: object, stride: object, *rest: object) -> Any:
    """Arguments of _rebuild_tensor and, with a flag, hooks and metadata more, of its version 2."""
    if rest[2:] and rest[2]:
        return Unreadable('a tensor that is negated or conjugated when read')
    if isinstance(storage, Unreadable):
        return storage
    place = _checked(storage, Storage)
    return Described(place, _size(offset), _sizes(size), _sizes(stride), place.dtype)


def _tensor_v3(
    storage: object, offset: object, size: object, stride: object, flag: object, hooks: object,
    dtype: object, *_: object,
) -> Any:  # fmt: skip
    kind = _checked(dtype, torch.dtype)
    return _tensor(storage, offset, size, stride)._replace(dtype=kind)


def _attributed(rebuild: object, kind: object, args: object, *_: object) -> Any:
    """A tensor with attributes, which are left out."""
    return _checked(rebuild, _Call)(*_checked(args, tuple))


def _first(value: object, *_: object) -> object:
    return value


def _unreadable(what: str) -> Callable[..., Unreadable]:
    return lambda *_: Unreadable(what)


def _none(*_: object) -> None:
    """Stand-in for functions whose result has no use here."""


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f'a {type(value).__name__} where a {kind.__name__} has to be')
    return value


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f'{value!r:.50} as a size')
    return value


def _sizes(values: object) -> tuple[int, ...]:
    return tuple(map(_size, _checked(values, tuple)))


_OPTIONS = ('yacs.config.CfgNode', 'addict.addict.Dict', 'mmcv.utils.config.ConfigDict',
            'mmengine.config.config.ConfigDict', 'collections.OrderedDict',
            'collections.Counter')  # fmt: skip
_MULTIARRAY = ('numpy.core.multiarray', 'numpy._core.multiarray')  # numpy 1 and 2
_SPECIAL = dict(
    _rebuild_sparse_tensor='a sparse tensor',
    _rebuild_sparse_csr_tensor='a sparse tensor',
    _rebuild_nested_tensor='a nested tensor',
    _rebuild_qtensor='a quantized tensor',
    _rebuild_meta_tensor_no_storage='a tensor on the meta device, without numbers',
    _rebuild_wrapper_subclass='a tensor subclass',
    _rebuild_device_tensor_from_numpy='a tensor of another device',
    _rebuild_device_tensor_from_cpu_tensor='a tensor of another device',
)
_STAND_INS: dict[str, object] = {
    **dict.fromkeys(_OPTIONS, _Dict),
    **{f'{module}.scalar': _Call(_scalar) for module in _MULTIARRAY},
    **{f'{module}._reconstruct': _Call(lambda *_: _Array()) for module in _MULTIARRAY},
    **{f'numpy.{core}.numeric._frombuffer': _Call(_frombuffer) for core in ('core', '_core')},
    **{f'torch._utils.{name}': _Call(_unreadable(what)) for name, what in _SPECIAL.items()},
    'numpy.ndarray': None,
    'torch.serialization._get_layout': _Call(_none),
    **dict.fromkeys(('torch.per_tensor_affine', 'torch.per_channel_affine')),
    'numpy.dtype': _Call(_Dtype),
    'argparse.Namespace': _Namespace,
    'mmengine.logging.history_buffer.HistoryBuffer': _Log,
    **dict.fromkeys(('torch.Tensor', 'torch.nn.parameter.Parameter')),
    'torch._tensor._rebuild_from_type': _Call(_attributed),
    'torch._tensor._rebuild_from_type_v2': _Call(_attributed),
    'torch._utils._rebuild_tensor': _Call(_tensor),
    'torch._utils._rebuild_tensor_v2': _Call(_tensor),
    'torch._utils._rebuild_tensor_v3': _Call(_tensor_v3),
    'torch._utils._rebuild_parameter': _Call(_first),
    'torch._utils._rebuild_parameter_with_state': _Call(_first),
    'torch.device': _Call(lambda *parts: ':'.join(map(str, parts))),
    'torch.Size': _Call(lambda sizes=(): _sizes(tuple(sizes))),
    'builtins.set': _Call(lambda values=(): set(_checked(values, list))),
    'builtins.frozenset': _Call(lambda values=(): frozenset(_checked(values, list))),
    'builtins.slice': _Call(lambda *parts: slice(*parts)),
    'builtins.complex': _Call(lambda *parts: complex(*parts)),
    'builtins.getattr': _Call(_none),  # mmengine's logs refer to their own methods
    '_codecs.encode': _Call(lambda text, _: _checked(text, str).encode('latin1')),
}


_SETITEM, _SETITEMS = (
    cast(Callable[[Any], None], pickle._Unpickler.dispatch[code[0]])
    for code in (pickle.SETITEM, pickle.SETITEMS)
)


class PlainUnpickler(pickle._Unpickler):  # the C one fills memory up to an index that a file names
    """Unpickler that makes plain data and descriptions of tensors.

    Raises:
        UnknownName: the pickle names something else.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Stand-in for an object."""
        path = f'{module}.{name}'.replace('__builtin__.', 'builtins.')
        if path in _STAND_INS:
            return _STAND_INS[path]
        if module in ('torch', 'torch.cuda', 'torch.storage') and name.endswith('Storage'):
            return _StorageType(STORAGE_DTYPES.get(name))
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnknownName(path)

    def persistent_load(self, pid: Any) -> Storage | Unreadable:
        """Storage that a file refers to."""
        tag, kind, key, _, count, *view = _checked(pid, tuple)
        if tag not in ('storage', b'storage') or view[1:]:
            raise ValueError(f'a reference of kind {tag!r:.50}')
        dtype = _checked(kind, _StorageType).dtype
        if dtype is None:
            return Unreadable('a tensor without plain numbers')
        if view and view[0] is not None:
            _, start, count = _checked(view[0], tuple)
            return Storage(str(key), dtype, _size(count), _size(start))
        return Storage(str(key), dtype, _size(count))

    def load_setitem(self) -> None:
        _check_key(self.stack[-2])  # type: ignore[attr-defined] # typeshed lacks it
        _SETITEM(self)

    def load_setitems(self) -> None:
        for key in self.stack[::2]:  # type: ignore[attr-defined] # typeshed lacks it
            _check_key(key)
        _SETITEMS(self)

    def refuse(self) -> None:
        raise ValueError('a bytearray')

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BYTEARRAY8[0]] = refuse  # reserves as much memory as the file says


def _check_key(key: object) -> None:
    """Raise unless a key is flat: Python computes the hash of a deep one on the C stack."""
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, (str, bytes, int, float, type(None))) for part in parts):
        raise ValueError(f'a {type(key).__name__} of other objects as a key')


# -------------------------------------------------------------------------------------- results


def resolve(content: Any, make: Callable[[Described], Any]) -> Any:
    """Plain data out of an unpickler's result: tensors by ``make``, arrays and logs.

    Raises:
        ValueError: it is nested more than :data:`MAX_DEPTH` deep.
    """
    return _Resolver(make)(content, 0)


class _Resolver:
    def __init__(self, make: Callable[[Described], Any]):
        self.make = make
        self.done: dict[int, Any] = {}

    def __call__(self, value: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f'objects nested more than {MAX_DEPTH} deep')
        if id(value) in self.done:
            return self.done[id(value)]
        if isinstance(value, Mapping):
            result: Any = _keep(self.done, value, {})
            result.update({k: self(v, depth + 1) for k, v in value.items()})
        elif isinstance(value, list):
            result = _keep(self.done, value, [])
            result.extend(self(v, depth + 1) for v in value)
        elif isinstance(value, Described):
            result = _keep(self.done, value, self.make(value))
        elif isinstance(value, (Unreadable, Storage, _Call, _StorageType)):
            result = value if isinstance(value, Unreadable) else None
        elif isinstance(value, tuple):
            result = tuple(self(v, depth + 1) for v in value)
        elif isinstance(value, _Array):
            result = value.value
        elif isinstance(value, _Log):
            result = _log(self(getattr(value, 'state', {}), depth + 1))
        else:
            result = None if isinstance(value, (_Dtype, type)) else value
        return result


def _keep(done: dict[int, Any], value: Any, result: Any) -> Any:
    done[id(value)] = result
    return result


def _log(state: dict) -> Log | None:
    values, counts = (state.get(f'_{name}_history') for name in ('log', 'count'))
    if not isinstance(values, np.ndarray) or not isinstance(counts, np.ndarray):
        return None
    return Log(values, counts, _size(state.get('max_length', 1_000_000)))
