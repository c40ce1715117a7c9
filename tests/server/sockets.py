"""Clients that behave badly: they go away, or do not read."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit


def send_request(url: str, path: str, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """A connection on which a request was sent and nothing was read."""
    parts = urlsplit(url)
    data = json.dumps(body).encode()
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(30)
    connection.connect((parts.hostname, parts.port))
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)
