"""The tests themselves: none of them can ask the network."""

import socket
import subprocess
import sys
import urllib.request

import pytest
from helpers.server import Answer, Server

ASK = 'import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=20).read())'


def test_nothing_leaves_the_process():
    with pytest.raises(OSError, match=r'a test asks the network for 192\.0\.2\.1'):
        socket.create_connection(('192.0.2.1', 80))
    for address in ('http://mmattn.invalid', 'https://192.0.2.1/w.pth'):
        with pytest.raises(OSError):
            urllib.request.urlopen(address)
    with pytest.raises(OSError, match=r'a test asks the network for mmattn\.invalid'):
        socket.getaddrinfo('mmattn.invalid', 443)


def test_processes_that_tests_start_ask_a_closed_port():
    with Server({'/here': Answer(b'here')}) as server:
        for address, answer in ((f'{server.address}/here', "b'here'"), ('http://192.0.2.1/', None)):
            command = [sys.executable, '-c', ASK, address]
            done = subprocess.run(command, capture_output=True, text=True)
            assert (done.stdout.strip() == answer) if answer else 'refused' in done.stderr
