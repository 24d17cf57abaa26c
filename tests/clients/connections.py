"""A client of HTTP/1.1 that costs little next to the server that it measures: kept connections, one request at a time on each."""

import asyncio
import dataclasses


class Lost(Exception):
    """The connection ended before the answer did, or the answer cannot be read."""


@dataclasses.dataclass
class Answer:
    status: int
    # Bytes of the head, in lower case.
    head: bytes
    body: bytes

    def header(self, name: str) -> str:
        """The value of a header; empty if there is none."""
        _, _, rest = self.head.partition(b"\r\n%s:" % name.encode())
        return rest.partition(b"\r\n")[0].strip().decode()


class Connection(asyncio.Protocol):
    """One connection. Answers must have a content-length."""

    def __init__(self):
        self.received = bytearray()
        self.waiting = None
        self.transport = None

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, error):
        if self.waiting and not self.waiting.done():
            self.waiting.set_exception(Lost(str(error or "the server closed the connection")))

    def data_received(self, data):
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end < 0 or self.waiting is None or self.waiting.done():
            return
        answer = Answer(0, bytes(self.received[:end + 2]).lower(), b"")
        try:
            answer.status = int(answer.head.split(None, 2)[1])
            length = int(answer.header("content-length"))
        except (IndexError, ValueError):
            self.waiting.set_exception(Lost(f"an answer without status or content-length: {answer.head[:200]!r}"))
            return
        if len(self.received) >= end + 4 + length:
            answer.body = bytes(self.received[end + 4:end + 4 + length])
            self.received.clear()
            self.waiting.set_result(answer)


class Connections:
    """Connections to one address, as many as requests are in progress."""

    def __init__(self, base):
        self.address = base.removeprefix("http://")
        self.unused = []

    async def post(self, path, body, seconds):
        """Sends JSON and returns the answer. Raises Lost, or TimeoutError after `seconds`."""
        connection = None
        while self.unused and connection is None:
            connection = self.unused.pop()
            if connection.transport.is_closing():
                connection = None
        if connection is None:
            host, port = self.address.split(":")
            _, connection = await asyncio.get_running_loop().create_connection(Connection, host, int(port))
        connection.waiting = asyncio.get_running_loop().create_future()
        connection.transport.write(
            b"POST %s HTTP/1.1\r\nhost: %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
            % (path.encode(), self.address.encode(), len(body), body)
        )
        try:
            async with asyncio.timeout(seconds):
                answer = await connection.waiting
        except BaseException:
            connection.transport.abort()
            raise
        self.unused.append(connection)
        return answer

    def close(self):
        for connection in self.unused:
            connection.transport.abort()
        self.unused.clear()
