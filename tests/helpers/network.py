"""No test reaches the network: neither its process, nor those that it starts.

Libraries of a child process ask the proxy of the environment, at which nobody answers; in the
process of the tests, connections and names outside this machine are refused as well.
"""

import os
import socket

HERE = ('127.0.0.1', '::1', 'localhost', '0.0.0.0', '::', '')
# Port 9, discard: nobody listens there.
NOWHERE = dict.fromkeys(('http_proxy', 'https_proxy', 'all_proxy'), 'http://127.0.0.1:9')
LOCAL = {'no_proxy': '127.0.0.1,localhost,::1'}


def close():
    """Refuse connections to anywhere but this machine, from here on."""
    for name, value in (NOWHERE | LOCAL).items():
        os.environ[name] = os.environ[name.upper()] = value
    for name in ('connect', 'connect_ex'):
        setattr(socket.socket, name, guarded(getattr(socket.socket, name), _address_of_connect))
    socket.getaddrinfo = guarded(socket.getaddrinfo, _host_of_look_up)


def guarded(function, host_of):
    """A function that raises instead of leaving this machine."""

    def guard(*args, **kwargs):
        host = host_of(*args, **kwargs)
        if host not in (*HERE, None, socket.gethostname()) and not str(host).startswith('127.'):
            raise OSError(f'a test asks the network for {host}')
        return function(*args, **kwargs)

    return guard


def _address_of_connect(connection, address):
    is_inet = connection.family in (socket.AF_INET, socket.AF_INET6)
    return address[0] if is_inet else None


def _host_of_look_up(host, *_, **__):
    return host.decode() if isinstance(host, bytes) else host
