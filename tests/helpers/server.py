"""A server on 127.0.0.1 that answers as servers of weights do, on good days and on bad ones."""

import http.client
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """An answer to GET.

    Attributes:
        body: what is sent.
        status: of HTTP.
        headers: besides Content-Length.
        length: Content-Length; None: that of the body; '': none, the end is where it closes.
        hang: 'before' the answer, 'after' its head or in the 'middle' of the body, until the server
            stops.
        pause: seconds after each byte.
    """

    body: bytes = b''
    status: int = 200
    headers: dict = field(default_factory=dict)
    length: str | None = None
    hang: str = ''
    pause: float = 0


def redirect(target, status=302):
    return Answer(status=status, headers={'Location': target})


def cut(body):
    """An answer that breaks off in the middle."""
    return Answer(body[: len(body) // 2], length=str(len(body)))


class Server:
    """Answers by path with query; what was asked for is in ``requests``, as (host, path).

    Args:
        answers: a dictionary, or anything with its ``get``.
    """

    def __init__(self, answers):
        self.answers = answers
        self.requests = []
        self.stopped = threading.Event()

    @property
    def address(self):
        return f'http://127.0.0.1:{self.port}'

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.headers['Host'], self.path))
                answer = outer.answers.get(self.path, Answer(status=404))
                outer._wait_at('before', answer)
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if answer.length != '':
                    self.send_header('Content-Length', answer.length or str(len(answer.body)))
                self.end_headers()
                outer._wait_at('after', answer)
                outer._send(answer, self.wfile)

            def log_message(self, *_):
                """Print no line for each request."""

        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.http.shutdown()
        self.http.server_close()

    def _wait_at(self, place, answer):
        if answer.hang == place:
            self.stopped.wait(60)

    def _send(self, answer, file):
        half = len(answer.body) // 2
        try:
            if answer.pause:
                for i in range(len(answer.body)):
                    file.write(answer.body[i : i + 1])
                    time.sleep(answer.pause)
                return
            file.write(answer.body[:half])
            self._wait_at('middle', answer)
            file.write(answer.body[half:])
        except ConnectionError:  # the client gave up
            pass


@contextmanager
def instead_of_https(monkeypatch, server):
    """Let connections to https addresses, whatever their host, arrive at a server here."""

    class Connection(http.client.HTTPConnection):
        default_port = 443

        def __init__(self, host, *, context=None, check_hostname=None, **options):
            super().__init__(host, **options)

        def connect(self):
            self.sock = socket.create_connection(('127.0.0.1', server.port), self.timeout)

    with monkeypatch.context() as patch:
        patch.setattr(http.client, 'HTTPSConnection', Connection)
        for name in ('https_proxy', 'HTTPS_PROXY'):
            patch.delenv(name, raising=False)
        yield
