"""Finding a checkpoint's file: a path, or an address that is downloaded once."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from http.client import HTTPException, HTTPResponse, IncompleteRead, RemoteDisconnected
from pathlib import Path
from time import monotonic
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener
from uuid import uuid4

import torch
from filelock import FileLock
from mmengine.logging import print_log

from .address import SHARED_NAMES, Address, is_address
from .errors import CheckpointError
from .kinds import START, not_a_checkpoint
from .progress import Progress

FOLDER = 'MMATTN_WEIGHTS'
# Seconds to wait for a connection and for each answer; also the time in which so many bytes have
# to arrive.
TIMEOUT = 30.0
MIN_BYTES = 64 * 1024
_PIECE = 1024 * 1024


class _Failure(Exception):
    """Reason why there is no whole file."""


def find_file(source: str) -> Path:
    """Find a checkpoint's file, downloading it if it is an address that was not asked for before.

    An address is looked for in the folder that the environment variable MMATTN_WEIGHTS names, by
    file name; then in torch.hub's folder, by the whole address; then it is downloaded, by one of
    several processes, while the others wait. License and origin of a published file are logged.

    Args:
        source: a path, or an http(s) address.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the address is not valid, the download failed, or the file is not the
            published one; one sentence says what to do. Nothing is kept of a failed download.
    """
    if not is_address(source):
        return _local(source)
    address = Address.parse(source)
    path = _in_folder(address) or _cached(address)
    if address.published:
        _say_once(f'{address.published.name}: {address.published.license}')
    return path


def _local(source: str) -> Path:
    try:
        path = Path(source).expanduser()
        is_there = path.is_file()
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a NUL in it
        path, is_there = Path(source), False
    if not is_there:
        raise FileNotFoundError(f'there is no checkpoint file {path}')
    return path


def _in_folder(address: Address) -> Path | None:
    folder = os.environ.get(FOLDER)
    if not folder:
        return None
    for name in address.names:
        path = Path(folder).expanduser() / name
        try:
            if not path.is_file():
                continue
            with path.open('rb') as file:
                fault = _fault(file.read(START), _digest(file) if address.sha256 else '', address)
        except OSError as error:
            raise CheckpointError(f'{path} cannot be read: {error.strerror}') from error
        if fault:
            raise CheckpointError(
                f'{path} is not the file of {address.label}: it {fault}; download it again, or '
                f'remove it'
            )
        if name != address.names[0] and name in SHARED_NAMES:
            _say_once(
                f'{path} is taken for {address.label}, though other published files have the same '
                f'name; to keep several, call this one {address.names[0]}'
            )
        return path
    return None


def _cached(address: Address) -> Path:
    path = Path(torch.hub.get_dir(), 'checkpoints', 'mmattn', address.cache_name)
    try:
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock := path.with_name(f'{path.name}.lock')):
            try:
                if not path.is_file():  # another process may have downloaded it meanwhile
                    print_log(f'downloading {address.label} to {path}', logger='current')
                    _download(address, path)
            finally:
                # Whoever waits for the lock looks for the file first, and every download has a
                # temporary file of its own, so that nobody needs the lock's file.
                lock.unlink(missing_ok=True)
    except (_Failure, OSError, HTTPException, ValueError) as error:
        # Without the error itself, which may hold the address with its secrets.
        raise CheckpointError(_remedy(address, path.parent, _reason(error))) from None
    return path


def _download(address: Address, path: Path) -> None:
    """Write to a temporary file beside `path`, and rename that when it is whole."""
    part = path.with_name(f'{path.name}.{uuid4().hex[:8]}.part')
    request = Request(address.url, headers={'User-Agent': 'mmattn'})
    try:
        with build_opener(_HttpOnly).open(request, timeout=TIMEOUT) as answer:
            start, digest = _copy(answer, part)
        if fault := _fault(start, digest, address):
            raise _Failure(f'what came {fault}')
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class _HttpOnly(HTTPRedirectHandler):
    """Redirects to other http(s) addresses alone; urllib would follow them to ftp."""

    def redirect_request(self, *args: Any) -> Request | None:
        if not is_address(args[-1]):
            raise _Failure(f'it redirects to {urlsplit(args[-1]).scheme}, which is not http')
        return super().redirect_request(*args)


def _copy(answer: HTTPResponse, part: Path) -> tuple[bytes, str]:
    """Write an answer to a file; return its first bytes and its SHA-256."""
    if (encoding := answer.headers.get('Content-Encoding', 'identity')) != 'identity':
        raise _Failure(f'it came encoded as {encoding}, which was not asked for')
    length = answer.headers.get('Content-Length')
    if length is not None and not length.isdecimal():
        raise _Failure(f'its length is given as {length!r}')
    size = None if length is None else int(length)
    start, digest, received = b'', hashlib.sha256(), 0
    deadline, before = monotonic() + TIMEOUT, 0
    progress = Progress(size)
    with part.open('xb') as file:
        while piece := answer.read1(_PIECE):
            file.write(piece)
            digest.update(piece)
            start = (start + piece)[:START] if received < START else start
            received += len(piece)
            progress.show(received)
            if monotonic() > deadline:
                if received - before < MIN_BYTES:
                    raise _Failure(f'only {received - before} bytes came in {TIMEOUT:.0f} s')
                deadline, before = monotonic() + TIMEOUT, received
        progress.end(received)
        os.fsync(file.fileno())
    if size is not None and received != size:
        raise _Failure(f'it ended after {received} of {size} bytes')
    return start, digest.hexdigest()


def _fault(start: bytes, digest: str, address: Address) -> str:
    """Fault of a file that begins so and has this hash; '' if it has none."""
    if kind := not_a_checkpoint(start):
        return f'is {kind} and no checkpoint'
    if not digest.startswith(address.sha256):
        known = address.sha256[:12]
        return f'has another SHA-256 ({digest[:12]}...) than the published file ({known}...)'
    return ''


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        if 300 <= error.code < 400:
            return 'it redirects without end, or to what is not http'
        return f'its server answers with HTTP status {error.code}'
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        return _reason(error.reason)
    if isinstance(error, TimeoutError):
        return f'its server did not answer within {TIMEOUT:.0f} s'
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, (IncompleteRead, RemoteDisconnected)):
        return 'its server closed the connection too early'
    if isinstance(error, (HTTPException, ValueError)):
        return f'its server does not speak HTTP as it should: {type(error).__name__}'
    return str(error).strip() or type(error).__name__


def _remedy(address: Address, cache_folder: Path, reason: str) -> str:
    failed = f'{address.label} cannot be downloaded ({reason}): get it by other means'
    if not address.names:
        return f'{failed} and name the file'
    put = f'{failed} and put it as {address.names[0]} into the folder'
    if folder := os.environ.get(FOLDER):
        return f'{put} {folder}, which {FOLDER} names'
    return f'{put} {cache_folder}, and set {FOLDER}={cache_folder}'


@cache
def _say_once(sentence: str) -> None:
    print_log(sentence, logger='current')
