"""Damaged and crafted files: read right or refused in one sentence, with the model unchanged."""

import gzip
import io
import pickle
import random
import struct
import threading
import zipfile

import numpy as np
import pytest
import torch
from helpers import published as files

from mmattn.backbones import GCViT
from mmattn.checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from mmattn.checkpoint.pickled import Log


def small():
    return GCViT(files.SMALL['gcvit'])


@pytest.fixture(scope='module')
def trained():
    return files.fill(small(), seed=1)


@pytest.fixture
def model():
    return files.fill(small(), seed=2)


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def refuse(model, source, match=''):
    """Load, expect one sentence of refusal, and the model unchanged."""
    before = copied(model)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_checkpoint(model, source)
    assert '\n' not in str(caught.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def assert_loads(model, source, trained):
    load_checkpoint(model, source)
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def repack(source, target, compression=zipfile.ZIP_STORED, change=lambda name, data: data):
    """Write an archive again, as a zip tool does; `change` returns other bytes, or None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w', compression) as new:
        for info in old.infolist():
            data = change(info.filename, old.read(info))
            if data is not None:
                new.writestr(info.filename, data)


# ------------------------------------------------------------------------------ crafted pickles


def craft(*operations):
    """Pickle of a dict: 'weights' and, as 'extra', what the operations leave on the stack."""
    return b'\x80\x02}X\x05\x00\x00\x00extra' + b''.join(operations) + b's.'


def name(module, attribute):
    return f'c{module}\n{attribute}\n'.encode()


def value(x):
    return pickle.dumps(x, protocol=2)[2:-1]


NDARRAY, DTYPE = name('numpy', 'ndarray'), name('numpy', 'dtype')
OBJECTS = DTYPE + value(('O', False, True)) + b'R'
DOUBLES = DTYPE + value(('f8', False, True)) + b'R' + value((3, '<', None, None, None, -1, -1, 0))
DOUBLES += b'b'
RECONSTRUCT = name('numpy._core.multiarray', '_reconstruct') + b'(' + NDARRAY + value((0,))
RECONSTRUCT += value(b'b') + b'tR'
CRAFTED = {
    'an array of objects': RECONSTRUCT + b'(K\x01' + value((1000,)) + OBJECTS + b'\x89]tb',
    'an array out of given memory': (
        NDARRAY + b'(' + value((1,)) + OBJECTS + value(b'A' * 8) + b'tR'
    ),
    'an array before its buffer': (
        NDARRAY + b'(' + value((1,)) + DOUBLES + value(b'A' * 8) + value(-4096) + b'tR'
    ),
    'an array larger than its bytes': (
        RECONSTRUCT + b'(K\x01' + value((2**40,)) + DOUBLES + b'\x89' + value(b'A' * 8) + b'tb'
    ),
    'a negative shape': (
        RECONSTRUCT + b'(K\x01' + value((-1, -1)) + DOUBLES + b'\x89' + value(b'A' * 8) + b'tb'
    ),
    'a scalar of an object': (
        name('numpy._core.multiarray', 'scalar') + b'(' + OBJECTS + value(b'A' * 8) + b'tR'
    ),
    'getattr of itself': (
        name('builtins', 'getattr') + b'(' + name('builtins', 'getattr') + value('__self__') + b'tR'
        + b'(' + value('exec') + b'tR'
    ),
    'attributes of a function': name('torch._utils', '_rebuild_tensor_v2') + b'}(X\x01\x00\x00\x00a'
    + b'K\x01ub',
    'attributes of a class': name('collections', 'OrderedDict') + b'}(X\x01\x00\x00\x00aK\x01ub',
    'a system call': name('os', 'getcwd') + b')R',
    'a huge memo': b'K\x01r\xff\xff\xff\xff',
    'a huge bytearray': b'\x96' + struct.pack('<Q', 2**62),
    'a huge string': b'\x8d' + struct.pack('<Q', 2**62),
    'a deep key': b'}' + b'K\x01' + b'\x85' * 500_000 + b'K\x01s',
    'deep lists': b']' * 200_000 + b'a' * 199_999,
    'an unfinished pickle': b'}(',
}  # fmt: skip


@pytest.mark.parametrize('kind', CRAFTED)
@pytest.mark.parametrize('archive', [True, False])
def test_crafted_pickles(kind, archive, tmp_path, model):
    data, file = craft(CRAFTED[kind]), tmp_path / 'crafted.pth'
    if archive:
        with zipfile.ZipFile(file, 'w') as zipped:
            zipped.writestr('crafted/data.pkl', data)
            zipped.writestr('crafted/version', '3\n')
    else:
        parts = (0x1950A86A20F9469CFC6C, 1001, dict(little_endian=True))
        file.write_bytes(b''.join(pickle.dumps(part, 2) for part in parts) + data + value([]))
    functions = {f: dict(vars(f)) for f in (torch._utils._rebuild_tensor_v2,)}
    try:
        content, _ = read_checkpoint(file)
    except CheckpointError as error:
        assert str(file) in str(error)
    else:  # read as plain data: not one object of the process
        assert content['extra'] is None or isinstance(content['extra'], (dict, int))
    refuse(model, file)
    assert all(vars(f) == before for f, before in functions.items())


# ------------------------------------------------------------------------------ damaged archives


@pytest.fixture(scope='module')
def whole(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp('whole') / 'whole.pth'
    torch.save({'state_dict': trained.state_dict(), 'meta': {'epoch': 1}}, path)
    return path


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED,
                                         zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])  # fmt: skip
def test_archives_of_zip_tools_are_read_right(compression, whole, trained, model, tmp_path):
    repack(whole, tmp_path / 'again.pth', compression)
    assert_loads(model, tmp_path / 'again.pth', trained)


@pytest.mark.parametrize('seed', range(12))
def test_flipped_bits_are_noticed(seed, whole, trained, model, tmp_path):
    data, draw = bytearray(whole.read_bytes()), random.Random(seed)
    for _ in range(draw.choice([1, 20])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    (tmp_path / 'flipped.pth').write_bytes(data)
    before = copied(model)
    try:
        load_checkpoint(model, tmp_path / 'flipped.pth')
    except CheckpointError as error:
        assert 'flipped.pth' in str(error) and '\n' not in str(error)
        before_or_trained = before
    else:  # a bit that means nothing, such as one of a date
        before_or_trained = trained.state_dict()
    for key, expected in before_or_trained.items():
        assert torch.equal(model.state_dict()[key], expected)


@pytest.mark.parametrize('size', [0.01, 0.3, 0.7, 0.999])
def test_truncated_files(size, whole, model, tmp_path):
    data = whole.read_bytes()
    (tmp_path / 'short.pth').write_bytes(data[: int(len(data) * size)])
    refuse(model, tmp_path / 'short.pth', r'short\.pth')


def test_parts_that_are_short_missing_or_double(whole, model, tmp_path):
    file = tmp_path / 'changed.pth'
    repack(whole, file, change=lambda n, d: d[:4] if n.endswith('data/3') else d)
    refuse(model, file, 'storage 3 has 4 bytes')
    repack(whole, file, change=lambda n, d: None if n.endswith('data/3') else d)
    refuse(model, file, r'changed\.pth is damaged')
    repack(whole, file, change=lambda n, d: b'big' if n.endswith('byteorder') else d)
    refuse(model, file, 'another byte order')
    repack(whole, file, change=lambda n, d: None if n.endswith('data.pkl') else d)
    refuse(model, file, 'is a zip archive, but not of torch.save')
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    refuse(model, file, 'is a TorchScript program')


def test_a_bomb_is_refused_before_it_is_unpacked(whole, model, tmp_path):
    file = tmp_path / 'bomb.pth'
    zeros = bytes(2**26)
    repack(whole, file, zipfile.ZIP_DEFLATED, lambda n, d: zeros if n.endswith('.pkl') else d)
    assert file.stat().st_size < 2**23
    refuse(model, file, 'would take 67108864 bytes')


def test_expanded_tensors_are_refused(trained, model, tmp_path):
    state = dict(trained.state_dict())
    state['stem.proj.weight'] = torch.zeros(1).expand(32, 3, 3, 3)
    torch.save(state, tmp_path / 'expanded.pth')
    refuse(model, tmp_path / 'expanded.pth', 'more elements than its storage')


# -------------------------------------------------------------------------- tensors of other kinds

KINDS = {
    'sparse': (lambda x: x.to_sparse(), 'as a sparse tensor'),
    'sparse CSR': (lambda x: x.flatten(1).to_sparse_csr(), 'as a sparse tensor'),
    'meta': (lambda x: x.to('meta'), 'meta'),
    'int8': (lambda x: x.to(torch.int8), r'of torch\.int8, which is torch\.float32'),
    'int64': (lambda x: x.long(), r'of torch\.int64'),
    'bool': (lambda x: x > 0, r'of torch\.bool'),
    'complex': (lambda x: x.to(torch.complex64), r'of torch\.complex64'),
    'float8': (lambda x: x.to(torch.float8_e4m3fn), r'of torch\.float8_e4m3fn'),
    'quantized': (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), 'a quantized tensor|without'
    ),
}  # fmt: skip


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('of', ['file', 'mapping'])
@pytest.mark.parametrize('key', ['stem.proj.weight', 'norm1.bias'])
@pytest.mark.filterwarnings('ignore')
def test_tensors_of_other_kinds_are_refused(kind, of, key, trained, model, tmp_path):
    change, message = KINDS[kind]
    state = dict(trained.state_dict())
    if kind == 'sparse CSR' and key == 'norm1.bias':
        key = 'stem.proj.weight'
    state[key] = change(state[key])
    if of == 'file':
        torch.save(state, tmp_path / 'other.pth')
    refuse(model, tmp_path / 'other.pth' if of == 'file' else state, message)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_read(dtype, trained, model, tmp_path):
    state = {name: value.to(dtype) for name, value in trained.state_dict().items()}
    torch.save(state, tmp_path / 'floats.pth')
    report = load_checkpoint(model, tmp_path / 'floats.pth')
    assert report.not_finite == []
    torch.testing.assert_close(model.norm1.bias, trained.norm1.bias, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('number', [float('nan'), float('inf'), 1e300])
def test_numbers_that_are_not_finite_are_reported(number, trained, model, tmp_path):
    state = dict(trained.state_dict())
    state['norm1.bias'] = state['norm1.bias'].double().clone()
    state['norm1.bias'][1] = number
    report = load_checkpoint(model, state)
    assert report.not_finite == ['backbone.norm1.bias']
    assert '1 with NaN or infinity' in report.summary and 'not finite: backbone.norm1' in str(
        report
    )


@pytest.mark.parametrize('shape', [(), (0, 4), (5,), (4, 0, 0), (3, 5, 5)])
def test_tables_of_odd_shapes_are_refused(shape, trained, model):
    state = dict(trained.state_dict())
    key = next(name for name in state if name.endswith('bias_table'))
    refuse(model, state | {key: torch.zeros(shape)}, 'relative_position_bias_table')


# ---------------------------------------------------------------------------------- other files


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'is empty'),
        (b'<!DOCTYPE html><html>', 'is an HTML page'),
        (b'\n  <html lang="en">', 'is an HTML page'),
        (b'{"error": "no such file"}', 'is JSON'),
        (b'version https://git-lfs.github.com/spec/v1\noid', 'is a pointer of git-lfs'),
        (gzip.compress(b'weights'), 'is compressed by gzip'),
        (b'BZh91AY&SY', 'is compressed by bzip2'),
        (b'\x7fELF\x02\x01\x01' + bytes(9), 'is a program'),
        (b'\x89PNG\r\n\x1a\n' + bytes(100), 'is a PNG image'),
        (bytes(1000), 'is a file of zeros'),
        (b'epoch 1, loss 0.5\n', "is text: it begins with 'epoch 1"),
        (bytes(range(1, 255)) * 9, r'other\.pth'),
    ],
)
def test_other_files_are_named(content, message, model, tmp_path):
    (tmp_path / 'other.pth').write_bytes(content)
    refuse(model, tmp_path / 'other.pth', message)


# --------------------------------------------------------------------------------------- threads


def test_threads_read_at_once_and_leave_the_process_as_it_was(trained, tmp_path):
    file = tmp_path / 'trained.pth'
    files.CONTAINERS['mmengine'](trained.state_dict(), file)
    allowed, problems = torch.serialization.get_safe_globals(), []

    def read():
        for _ in range(10):
            try:
                content, _ = read_checkpoint(file)
                if torch.serialization.get_safe_globals() != allowed:
                    problems.append('torch allows other names')
                log = content['message_hub']['log_scalars']['train/loss']
                assert isinstance(log, Log) and np.array_equal(log.values, [0.5, 0.25])
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_every_dtype_view_and_shape_is_read_as_torch_reads_it(tmp_path):
    base = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    tensors = {
        str(dtype): base.to(dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8,
                      torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
                      torch.complex64)
    }  # fmt: skip
    tensors |= dict(view=base[1:3, ::2], transposed=base.t(), empty=base[:0], number=base[2, 3],
                    parameter=torch.nn.Parameter(base.clone()))  # fmt: skip
    tensors['with attributes'] = base.clone()
    tensors['with attributes'].note = 'left out'
    content = dict(tensors=tensors, rest=[1, 2.5, 'x', None, True, (1, 2), {3}, b'bytes'])
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        (tmp_path / 'all.pth').write_bytes(buffer.getvalue())
        read, _ = read_checkpoint(tmp_path / 'all.pth')
        assert read['rest'] == content['rest']
        for key, expected in tensors.items():
            assert read['tensors'][key].dtype == expected.dtype
            assert torch.equal(read['tensors'][key], expected), key
