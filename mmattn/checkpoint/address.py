"""Addresses of checkpoints: what may be shown of them, and by which names their file is kept."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from .errors import CheckpointError
from .published import PUBLISHED, File

# Query of share links of Seafile, without which they are pages.
_DIRECT = '?dl=1'
_BROWSER_ONLY = ('drive.google.com', '1drv.ms', 'onedrive.live.com')
_HASH_IN_NAME = re.compile(r'-([0-9a-f]{8,64})(\.[A-Za-z0-9]+)+$')  # as torch.hub has it
_LONGEST_NAME = 200
# Names that several published addresses end in, such as b0.pth.
SHARED_NAMES = {
    name
    for name in (PurePosixPath(urlsplit(url).path).name for url in PUBLISHED)
    if sum(url.endswith(f'/{name}') for url in PUBLISHED) > 1
}


def is_address(source: str) -> bool:
    """True for what begins as an http(s) address."""
    return re.match(r'https?:', source, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Address:
    """Address of a file.

    Attributes:
        url: to ask for; it may hold secrets.
        label: for messages and files: without its query, unless it is a published address.
        file_name: at the end of its path; '' where there is none to use as the name of a file.
        published: what is known of a published file.
    """

    url: str
    label: str
    file_name: str
    published: File | None

    @classmethod
    def parse(cls, source: str) -> Address:
        """Take an http(s) address apart.

        Raises:
            CheckpointError: it is not valid, names a user or password, or is a link for browsers.
        """
        source = source.partition('#')[0]  # metafiles name the file there, for `mim download`
        if source + _DIRECT in PUBLISHED:
            source += _DIRECT
        # Whatever is wrong with it, neither a query nor a password is shown.
        shown = re.sub(r'^(\w+:/*)[^/]*@', r'\1', source.partition('?')[0])
        try:
            parts = urlsplit(source)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host:
            raise CheckpointError(f'{shown} is no valid address')
        if '@' in parts.netloc:
            raise CheckpointError(
                f'{shown} was given with a user name or password, which are never sent; download '
                f'the file by other means and name the file'
            )
        if host in _BROWSER_ONLY:
            raise CheckpointError(
                f'{shown} can only be opened by a browser: download the file with one and name '
                f'the file'
            )
        path = quote(parts.path, safe="/%:@!$&'()*+,;=~")
        query = quote(parts.query, safe="/%:@!$&'()*+,;=~?")
        url = urlunsplit((parts.scheme, parts.netloc, path, query, ''))
        published = PUBLISHED.get(source)
        return cls(url, source if published else shown, _file_name(parts.path), published)

    @property
    def names(self) -> tuple[str, ...]:
        """Names by which a folder of weights may hold the file, the one to recommend first."""
        names = (self.published.name if self.published else '', self.file_name)
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def sha256(self) -> str:
        """Known beginning of the file's SHA-256, whole where possible; '' where it is unknown."""
        if self.published and self.published.sha256:
            return self.published.sha256
        match = _HASH_IN_NAME.search(self.file_name)
        return match[1] if match else ''

    @property
    def cache_name(self) -> str:
        """A name of its own for each address: many files of model hubs have the same name."""
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return '-'.join([digest, *(re.sub(r'[^\w.+-]', '_', name) for name in self.names[:1])])


def label_of(source: str) -> str:
    """Path or address for messages and files: without query and password."""
    return Address.parse(source).label if is_address(source) else source


def _file_name(path: str) -> str:
    name = unquote(path.rpartition('/')[2])
    plain = PurePosixPath(name).name == name != '..' and name.isprintable()
    return name if plain and len(name.encode(errors='replace')) <= _LONGEST_NAME else ''
