import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest


@pytest.fixture
def served():
    """Context manager that serves a folder by HTTP and returns its address."""

    @contextmanager
    def serve(folder):
        handler = partial(SimpleHTTPRequestHandler, directory=folder)
        with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f'http://127.0.0.1:{server.server_port}'
            server.shutdown()

    return serve
