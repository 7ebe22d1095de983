"""Kinds of files that are no checkpoints, by their first bytes."""

from __future__ import annotations

START = 512
"""Bytes that suffice."""

_TEXTS = (
    ('version https://git-lfs', 'a pointer of git-lfs (`git lfs pull` gets the file)'),
    ('<!doctype html', 'an HTML page'),
    ('<html', 'an HTML page'),
    ('<?xml', 'XML'),
    ('{', 'JSON'),
    ('[', 'JSON'),
)
_MAGIC = (
    (b'\x1f\x8b', 'compressed by gzip (`gunzip` unpacks it)'),
    (b'BZh', 'compressed by bzip2 (`bunzip2` unpacks it)'),
    (b'\xfd7zXZ', 'compressed by xz (`unxz` unpacks it)'),
    (b'\x28\xb5\x2f\xfd', 'compressed by zstd (`unzstd` unpacks it)'),
    (b'7z\xbc\xaf', 'a 7z archive'),
    (b'Rar!', 'a RAR archive'),
    (b'\x7fELF', 'a program or library'),
    (b'\x89PNG', 'a PNG image'),
    (b'\xff\xd8\xff', 'a JPEG image'),
    (b'\x89HDF', 'an HDF5 file, as of Keras'),
    (b'\x93NUMPY', 'a numpy array'),
    (b'%PDF', 'a PDF'),
)


def not_a_checkpoint(start: bytes) -> str:
    """Kind of a file that is no checkpoint; '' if it may be one.

    Args:
        start: the first :data:`START` bytes, or all that there are.
    """
    if not start:
        return 'empty'
    for magic, kind in _MAGIC:
        if start.startswith(magic):
            return kind
    if start[257:262] == b'ustar':
        return 'a tar archive'
    if not any(start.strip(b'\0')):
        return 'a file of zeros'
    if b'\0' in start or start[:1] == b'\x80':
        return ''
    try:
        text = start.decode(errors='strict' if len(start) < START else 'ignore').lstrip()
    except UnicodeDecodeError:
        return ''
    kind = next((kind for begin, kind in _TEXTS if text.lower().startswith(begin)), 'text')
    return f'{kind}: it begins with {text[:20]!r}' if kind == 'text' else kind
