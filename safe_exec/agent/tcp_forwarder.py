"""Connects Unix sockets to a kernel's TCP ports, for kernels in a network namespace of their own.

    python tcp_forwarder.py PREFIX PORT... -- COMMAND...

Listens on PREFIX-PORT for each port, starts a process that forwards each connection to this port of
loopback, and becomes the command. Standard library only, Python 3.9.
"""

import os
import select
import signal
import socket
import sys
import time

LOOPBACK = "127.0.0.1"

# Our end of a connection: a socket that connects to an unused port of its own address can, by
# chance, connect to itself (simultaneous open, RFC 9293, 3.5).
OTHER_LOOPBACK = "127.0.0.2"
CHUNK_BYTES = 256 << 10
RETRY_SECONDS = 0.01


class Direction:
    """One direction of a connection: copies bytes from one socket to the other.

    It reads a chunk only after the previous one has been written.
    """

    def __init__(self, source, target):
        self.source, self.target = source, target
        self.waiting = b""
        self.is_open = True

    def move(self):
        """Read a chunk, or write a part of the pending one."""
        if not self.waiting:
            try:
                self.waiting = self.source.recv(CHUNK_BYTES)
            except BlockingIOError:
                return
            except OSError:
                self.waiting = b""
            if not self.waiting:
                self._end()
                return
        try:
            self.waiting = self.waiting[self.target.send(self.waiting) :]
        except BlockingIOError:
            pass
        except OSError:
            self.waiting = b""
            self._end()

    def _end(self):
        self.is_open = False
        try:
            self.target.shutdown(socket.SHUT_WR)
        except OSError:
            # The other end has closed it already.
            pass


def forward(listeners, kernel):
    """Forward connections to the kernel's TCP ports until the kernel is gone.

    ``listeners`` maps each listening socket to the port behind it. ``kernel`` is a pidfd
    (pidfd_open(2)): it becomes readable when the kernel ends.
    """
    directions, pending = [], []
    is_gone = False
    # A kernel that ends closes its sockets; what it had sent goes out first.
    while not is_gone or directions:
        poll = select.poll()
        by_descriptor = {}
        for sock in listeners:
            poll.register(sock, select.POLLIN)
        if not is_gone:
            poll.register(kernel, select.POLLIN)
        for direction in directions:
            sock = direction.target if direction.waiting else direction.source
            event = select.POLLOUT if direction.waiting else select.POLLIN
            # One socket can be read for one direction and written for the other.
            entry = by_descriptor.setdefault(sock.fileno(), [0, []])
            entry[0] |= event
            entry[1].append((event, direction))
        for descriptor, (events, _) in by_descriptor.items():
            poll.register(descriptor, events)
        listening = {sock.fileno(): sock for sock in listeners}
        for descriptor, events in poll.poll(int(RETRY_SECONDS * 1000) if pending else None):
            if descriptor in listening:
                sock = listening[descriptor]
                pending.append((sock.accept()[0], listeners[sock]))
                continue
            if descriptor == kernel:
                is_gone = True
                continue
            for event, direction in by_descriptor[descriptor][1]:
                if events & (event | select.POLLHUP | select.POLLERR):
                    direction.move()
        unanswered = []
        for sock, port in pending:
            inner = connected(port)
            if inner is None:
                unanswered.append((sock, port))
                continue
            sock.setblocking(False)
            directions += [Direction(sock, inner), Direction(inner, sock)]
        pending = unanswered
        directions = [direction for direction in directions if direction.is_open]


def connected(port):
    """Return a connection to a port of loopback; ``None`` while nobody listens."""
    sock = socket.socket()
    try:
        # Messages are small and each waits for its reply, so Nagle's algorithm would add 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind((OTHER_LOOPBACK, 0))
        sock.connect((LOOPBACK, port))
    except OSError:
        sock.close()
        # The kernel is about to listen. Do not spin until then.
        time.sleep(RETRY_SECONDS)
        return None
    sock.setblocking(False)
    return sock


def run_forwarder(listeners):
    """Start a detached process that forwards the connections.

    Returns only in the caller's process.
    """
    kernel = os.pidfd_open(os.getpid())
    # Twice forked: a child of the kernel's process would show up in its `wait` and in its list of
    # children.
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os.close(kernel)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    # Interrupts are for the kernel.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    last = 3
    for descriptor in sorted([kernel, *(sock.fileno() for sock in listeners)]):
        os.closerange(last, descriptor)
        last = descriptor + 1
    os.closerange(last, 4096)
    try:
        forward(listeners, kernel)
    finally:
        os._exit(0)


def main(prefix, ports, command):
    """Listen, start the forwarder, and become the command."""
    listeners = {}
    for port in ports:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind("%s-%d" % (prefix, port))
        sock.listen(5)
        listeners[sock] = port
    run_forwarder(listeners)
    os.execvp(command[0], command)


if __name__ == "__main__":
    at = sys.argv.index("--")
    main(sys.argv[1], [int(port) for port in sys.argv[2:at]], sys.argv[at + 1 :])
