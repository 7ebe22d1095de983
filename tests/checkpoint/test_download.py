"""Addresses: where their file is looked for, how it is downloaded, and what is refused."""

import hashlib
import multiprocessing
import re
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.server import Answer, Server, cut, instead_of_https, redirect

from mmattn.checkpoint import CheckpointError, download, find_file, read_checkpoint
from mmattn.checkpoint.published import PUBLISHED

GCVIT = 'https://huggingface.co/nvidia/GCViT/resolve/main/gcvit_1k_tiny.pth.tar'
UNHASHED = GCVIT.replace('tiny', 'xxtiny')
SHARE = 'https://cloud.tsinghua.edu.cn/f/1367349deefc48efa650/'
RELEASES = 'https://github.com/Tangshitao/QuadTreeAttention/releases/download'
SECRET = 'SECRET-b1946ac9'


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Bytes of a small checkpoint."""
    path = tmp_path_factory.mktemp('weights') / 'weights.pth'
    torch.save({'state_dict': {'x': torch.arange(1000.0)}}, path)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """An empty folder of torch.hub, and no folder of weights."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    monkeypatch.delenv('MMATTN_WEIGHTS', raising=False)
    download._say_once.cache_clear()
    return tmp_path / 'hub'


@pytest.fixture
def said(monkeypatch):
    """Messages that were logged."""
    said = []
    monkeypatch.setattr(download, 'print_log', lambda message, logger: said.append(message))
    return said


def files(folder):
    """Files anywhere below a folder."""
    return sorted(path for path in folder.rglob('*') if path.is_file())


def refusal(source):
    with pytest.raises(CheckpointError) as caught:
        find_file(source)
    assert caught.value.__cause__ is None
    return str(caught.value)


# ------------------------------------------------------------------------------ the good days


def test_an_address_is_downloaded_once(weights, hub, said, capfd):
    with Server({'/tiny/model.pth': Answer(weights)}) as server:
        path = find_file(f'{server.address}/tiny/model.pth')
        assert find_file(f'{server.address}/tiny/model.pth') == path
    assert find_file(f'{server.address}/tiny/model.pth') == path
    assert path.read_bytes() == weights and files(hub) == [path]
    assert len(server.requests) == 1
    assert said == [f'downloading {server.address}/tiny/model.pth to {path}']
    printed = capfd.readouterr()
    assert '100% of' in printed.err and not printed.out


def test_files_of_one_name_are_kept_apart(weights):
    other = weights + bytes(8)
    with Server({'/a/b0.pth': Answer(weights), '/b/b0.pth': Answer(other)}) as server:
        paths = [find_file(f'{server.address}/{folder}/b0.pth') for folder in 'ab']
    assert [path.read_bytes() for path in paths] == [weights, other]


def test_redirects_are_followed(weights, said):
    """As Hugging Face and GitHub do: to another address, with a signature."""
    with Server({}) as server:
        server.answers |= {
            '/main/w.pth': redirect(f'{server.address}/cdn/1?signature={SECRET}'),
            f'/cdn/1?signature={SECRET}': Answer(weights),
        }
        path = find_file(f'{server.address}/main/w.pth')
    assert path.read_bytes() == weights and path.name.endswith('-w.pth')
    assert SECRET not in str(said)


@pytest.mark.parametrize('length', [None, ''])
def test_an_answer_may_lack_its_length(weights, length):
    with Server({'/w.pth': Answer(weights, length=length)}) as server:
        assert find_file(f'{server.address}/w.pth').read_bytes() == weights


def test_an_address_without_a_file_name(weights, said, monkeypatch):
    with Server({'/f/1367349deefc48efa650/?dl=1': Answer(weights)}) as server:
        assert find_file(f'{server.address}/f/1367349deefc48efa650/?dl=1').read_bytes() == weights
        with instead_of_https(monkeypatch, server):
            path = find_file(SHARE)  # which would be a page without ?dl=1
    assert path.name.endswith('-dat_tiny_in1k_224.pth')
    assert f'downloading {SHARE}?dl=1 to {path}' in said
    assert server.requests[-1] == ('cloud.tsinghua.edu.cn', '/f/1367349deefc48efa650/?dl=1')


def test_a_hash_in_the_name_is_compared(weights, hub):
    digest = hashlib.sha256(weights).hexdigest()
    right, wrong = f'/w-{digest[:8]}.pth', f'/w-{digest[1:9]}.pth'
    with Server({right: Answer(weights), wrong: Answer(weights)}) as server:
        path = find_file(server.address + right)
        assert 'has another SHA-256' in refusal(server.address + wrong)
    assert files(hub) == [path]


def test_a_known_hash_is_compared_whole(weights, hub, monkeypatch):
    digest = hashlib.sha256(weights).hexdigest()
    nearly = PUBLISHED[GCVIT]._replace(sha256=digest[:63] + 'g')
    server = Server({GCVIT.removeprefix('https://huggingface.co'): Answer(weights)})
    with server, instead_of_https(monkeypatch, server):
        error = refusal(GCVIT)
        assert GCVIT in error and 'has another SHA-256' in error
        monkeypatch.setitem(PUBLISHED, GCVIT, nearly)
        assert 'has another SHA-256' in refusal(GCVIT)
        monkeypatch.setitem(PUBLISHED, GCVIT, nearly._replace(sha256=digest))
        find_file(GCVIT)


def test_the_license_is_said_once(weights, said, monkeypatch):
    server = Server({UNHASHED.removeprefix('https://huggingface.co'): Answer(weights)})
    with server, instead_of_https(monkeypatch, server):
        find_file(UNHASHED)
    find_file(UNHASHED)
    (license,) = [message for message in said if 'CC BY-NC-SA' in message]
    assert license.startswith('gcvit_1k_xxtiny.pth.tar: ') and 'not for commercial use' in license


def test_several_processes_download_once(weights, hub):
    context = multiprocessing.get_context('fork')
    server = Server({'/w.pth': Answer(weights, pause=0.5 / len(weights))})
    with server, context.Pool(4) as pool:
        found = pool.map(find_file, [f'{server.address}/w.pth'] * 4, chunksize=1)
    assert len(server.requests) == 1 and len(set(found)) == 1
    assert found[0].read_bytes() == weights and files(hub) == [found[0]]


def test_threads_download_once(weights):
    with Server({'/w.pth': Answer(weights, pause=0.3 / len(weights))}) as server:
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(find_file(f'{server.address}/w.pth')))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(server.requests) == 1 and len(found) == 4 and len(set(found)) == 1


# --------------------------------------------------------------------------------- the folder


def test_the_folder_comes_first(weights, tmp_path, monkeypatch, hub, said):
    """By file name, or by the published name of an address without one."""
    monkeypatch.setenv('MMATTN_WEIGHTS', str(tmp_path))
    for source, name in (
        ('http://host.invalid/some/model.pth?download=true', 'model.pth'),
        ('http://host.invalid/some/my%20model.pth', 'my model.pth'),
        (UNHASHED, 'gcvit_1k_xxtiny.pth.tar'),
        (f'{SHARE}?dl=1', 'dat_tiny_in1k_224.pth'),
        (SHARE, 'dat_tiny_in1k_224.pth'),
        (f'{SHARE}?dl=1#/dat_tiny_in1k_224.pth', 'dat_tiny_in1k_224.pth'),
        (f'{RELEASES}/QuadTreeAttention_seg/b0.pth', 'fpn_quadtree_b0_ade20k.pth'),
    ):
        (tmp_path / name).write_bytes(weights)
        assert find_file(source) == tmp_path / name
    assert not hub.exists()
    assert sum('CC BY-NC-SA' in message for message in said) == 1


def test_names_that_published_files_share(weights, tmp_path, monkeypatch, said):
    monkeypatch.setenv('MMATTN_WEIGHTS', str(tmp_path))
    (tmp_path / 'b0.pth').write_bytes(weights)
    classifier, detector = (
        f'{RELEASES}/QuadTreeAttention{tag}/b0.pth' for tag in ('', '_detection')
    )
    assert find_file(classifier) == tmp_path / 'b0.pth'
    assert 'call this one quadtree_b0_imagenet.pth' in said[0]
    (tmp_path / 'retinanet_quadtree_b0_1x_coco.pth').write_bytes(weights)
    assert find_file(detector) == tmp_path / 'retinanet_quadtree_b0_1x_coco.pth'


def test_a_wrong_file_in_the_folder_is_refused(weights, tmp_path, monkeypatch):
    monkeypatch.setenv('MMATTN_WEIGHTS', str(tmp_path))
    for name, address, content, fault in (
        ('gcvit_1k_tiny.pth.tar', GCVIT, weights, 'has another SHA-256'),
        ('w-01234567.pth', 'http://host.invalid/w-01234567.pth', weights, 'has another SHA-256'),
        ('w.pth', 'http://host.invalid/w.pth', b'<!DOCTYPE html><p>Sign in', 'is an HTML page'),
    ):
        (tmp_path / name).write_bytes(content)
        error = refusal(address)
        assert str(tmp_path / name) in error and fault in error and address in error


# -------------------------------------------------------------------------------- the bad days


def chunked(body):
    """The first half of an answer in chunks."""
    half = body[: len(body) // 2]
    piece = b'%x\r\n%b\r\n' % (len(half), half)
    return Answer(piece, headers={'Transfer-Encoding': 'chunked'}, length='')


BAD = {
    'breaks off': (cut, r'ended after \d+ of \d+ bytes'),
    'longer than it says': (lambda w: Answer(w, length=str(10**15)), 'ended after'),
    'no number': (lambda w: Answer(w, length='much'), "length is given as 'much'"),
    'negative': (lambda w: Answer(w, length='-1'), "length is given as '-1'"),
    'chunks break off': (chunked, 'closed the connection too early'),
    'nothing': (lambda w: Answer(b''), 'is empty'),
    'HTML': (lambda w: Answer(b'\n<!doctype html>\n<title>Sign in'), 'is an HTML page'),
    'HTML without type': (lambda w: Answer(b'<html><body>' + 900 * 'ü'.encode()), 'an HTML page'),
    'JSON': (lambda w: Answer(b'{"error": "Repository not found"}'), 'is JSON'),
    'text': (lambda w: Answer(b'Too many requests'), 'is text'),
    'git-lfs': (
        lambda w: Answer(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n'),
        'is a pointer of git-lfs',
    ),
    'compressed': (
        lambda w: Answer(w, headers={'Content-Encoding': 'gzip'}),
        'encoded as gzip, which was not asked for',
    ),
    '404': (lambda w: Answer(w, status=404), 'HTTP status 404'),
    '403': (lambda w: Answer(w, status=403), 'HTTP status 403'),
    '503': (lambda w: Answer(w, status=503), 'HTTP status 503'),
    'loop': (lambda w: redirect('/w.pth'), 'redirects without end'),
    'to a file': (lambda w: redirect('file:///etc/passwd'), 'what is not http'),
    'to ftp': (lambda w: redirect('ftp://127.0.0.1/w.pth'), 'ftp, which is not http'),
    'to nonsense': (lambda w: redirect('http://[::1/w.pth'), 'does not speak HTTP'),
    'hangs': (lambda w: Answer(w, hang='before'), r'did not answer within'),
    'hangs after its head': (lambda w: Answer(w, hang='after'), r'did not answer within'),
    'hangs in the middle': (lambda w: Answer(w, hang='middle'), r'did not answer within'),
    'drips': (lambda w: Answer(w, pause=0.05), r'only \d+ bytes came'),
}


@pytest.mark.parametrize('kind', BAD)
def test_a_failed_download_is_one_sentence_and_keeps_nothing(
    kind, weights, hub, monkeypatch, tmp_path
):
    answer, fault = BAD[kind]
    monkeypatch.setattr(download, 'TIMEOUT', 0.5)
    monkeypatch.setattr(download, 'MIN_BYTES', 1000)
    with Server({'/w.pth': answer(weights)}) as server:
        address = f'{server.address}/w.pth'
        error = refusal(address)
        assert re.search(fault, error), error
        assert error.startswith(f'{address} cannot be downloaded (') and '\n' not in error
        assert 'put it as w.pth into the folder' in error and 'set MMATTN_WEIGHTS=' in error
        assert files(hub) == []
        monkeypatch.setenv('MMATTN_WEIGHTS', str(tmp_path / 'mine'))
        assert f'into the folder {tmp_path / "mine"}, which MMATTN_WEIGHTS' in refusal(address)
        server.answers['/w.pth'] = Answer(weights)
        assert find_file(address).read_bytes() == weights, 'the next attempt works'


def test_nobody_answers(hub):
    with Server({}) as server:
        pass  # it is closed again, so that nobody listens at its address
    assert 'Connection refused' in refusal(f'{server.address}/w.pth')
    assert files(hub) == []


def test_a_download_that_the_user_interrupts_keeps_nothing(weights, hub, monkeypatch):
    def interrupt(self, received):
        raise KeyboardInterrupt

    monkeypatch.setattr(download.Progress, 'show', interrupt)
    with Server({'/w.pth': Answer(weights)}) as server, pytest.raises(KeyboardInterrupt):
        find_file(f'{server.address}/w.pth')
    assert files(hub) == []


def test_a_folder_that_cannot_be_written(weights, hub, monkeypatch, tmp_path):
    hub.write_text('a file')
    with Server({'/w.pth': Answer(weights)}) as server:
        assert 'Not a directory' in refusal(f'{server.address}/w.pth')
    assert server.requests == []


# ------------------------------------------------------------------------------- odd addresses


@pytest.mark.parametrize(
    'path',
    [
        '/../../../../escaped.pth',
        '/a/../../../../../escaped.pth',
        '/%2e%2e/%2e%2e/%2e%2e/%2e%2e/escaped.pth',
        '/..%2F..%2F..%2F..%2Fescaped.pth',
        '/..',
        '/a/.',
        '/%2e%2e',
        '/a%00b.pth',
        '/a\\..\\b.pth',
        '/x' * 2000,
        f'/{"x" * 3000}.pth',
        f'/w.pth?X-Amz-Signature={"a" * 3000}',
        '/poids français.pth',
        '/w.pth#part',
    ],
)
def test_no_address_leaves_the_folders(path, weights, hub, monkeypatch, tmp_path):
    folder = tmp_path / 'a/b/c'
    folder.mkdir(parents=True)
    monkeypatch.setenv('MMATTN_WEIGHTS', str(folder))
    (tmp_path / 'escaped.pth').write_bytes(b'not asked for')
    with Server(SimpleNamespace(get=lambda *_: Answer(weights))) as server:
        found = find_file(server.address + path)
    assert found.parent == hub / 'checkpoints/mmattn' and found.read_bytes() == weights
    assert files(tmp_path) == sorted([found, tmp_path / 'escaped.pth'])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    'address',
    [
        'http://[::1/x.pth',
        'http://[nonsense]/x.pth',
        'http:///x.pth',
        'http://host:port/x.pth',
        'http:x.pth',
        'https://',
    ],
)
def test_addresses_that_are_none(address):
    assert 'is no valid address' in refusal(f'{address}?token={SECRET}')
    assert SECRET not in refusal(f'{address}?token={SECRET}')


@pytest.mark.parametrize(
    'address',
    [
        'https://drive.google.com/file/d/1sT7oNC-LUyOE1yhJACrODx5Tk1FQHddr/view?usp=sharing',
        'https://drive.google.com/uc?export=download&id=1apSIWQCa5VhWLJws8ugMTuyKzyayw4Eh',
        'https://1drv.ms/u/s!ApI0vb6wPqmtgroLKGEtPqZe5vVKgA?e=l61dNf',
    ],
)
def test_links_for_browsers_are_named_as_such(address):
    assert 'can only be opened by a browser' in refusal(address)


def test_secrets_are_neither_shown_nor_written(weights, hub, said, tmp_path, capfd):
    """Of an address that works, of one that fails, and in a converted file."""
    state = {f'x{i}': torch.zeros(1) for i in range(2)}
    torch.save(state, tmp_path / 'state.pth')
    good, bad = f'/w.pth?token={SECRET}', f'/none.pth?token={SECRET}'
    with Server({good: Answer(weights)}) as server:
        content, label = read_checkpoint(server.address + good)
        errors = [refusal(server.address + bad)]
        at = server.address.replace('//', f'//user:{SECRET}@')
        errors += [refusal(at + good), refusal(at.replace('//', '/') + good)]
        errors.append(refusal(f'http://user:{SECRET}@[::1/w.pth'))
    assert 'state_dict' in content and label == f'{server.address}/w.pth'
    printed = capfd.readouterr()
    shown = f'{errors} {said} {printed.out} {printed.err} {files(hub)}'
    assert SECRET not in shown
    assert 'user name or password, which are never sent' in errors[1]
    assert not any(SECRET.encode() in path.read_bytes() for path in files(hub))


def test_paths_that_are_none(tmp_path):
    for path in ('nowhere.pth', '~nosuchuser/x.pth', 'x' * 5000, 'a\0b', str(tmp_path), 's3://b/x'):
        with pytest.raises(FileNotFoundError, match='there is no checkpoint file'):
            find_file(path)
    (tmp_path / 'x.pth').touch()
    assert find_file(str(tmp_path / 'x.pth')) == tmp_path / 'x.pth'


# ------------------------------------------------------------------------------------ progress


def test_progress_in_a_terminal_and_in_a_log(monkeypatch, capsys):
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, 'isatty', partial(bool, terminal), raising=False)
        progress = download.Progress(2_000_000)
        progress.show(500_000)
        progress.next = 0
        progress.show(1_000_000)
        progress.end(2_000_000)
        printed = capsys.readouterr().err
        assert '25%' not in printed, 'not at every piece'
        assert '50% of 2.0 MB' in printed and '100% of 2.0 MB' in printed
        assert ('\r' in printed) == ('[#' in printed) == terminal
    download.Progress(None).end(3_000_000)
    assert '3.0 MB, ' in capsys.readouterr().err
