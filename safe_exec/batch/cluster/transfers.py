"""Send the files of notebooks to machines that lack them, each archive once."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from pathlib import Path
from typing import IO, TYPE_CHECKING

from msgspec.structs import replace

from safe_exec.batch.cluster import files
from safe_exec.batch.cluster.messages import SourceFiles

if TYPE_CHECKING:
    from distributed import Client


class FileTransfers:
    """The archives of a batch and their transfers. They lack the output directory ``out``."""

    def __init__(self, client: Client, out: Path) -> None:
        self.client, self.out = client, out
        # Digests of archives by their folder, and the archives.
        self.archive_of: dict[str, str] = {}
        self.archives: dict[str, IO[bytes]] = {}
        self.packing = threading.Lock()
        # By machine and digest.
        self.running: dict[tuple[str, str], asyncio.Task[None]] = {}

    def close(self) -> None:
        """Close the archives; transfers that still run fail."""
        for archive in self.archives.values():
            archive.close()

    async def pack(self, source: SourceFiles) -> SourceFiles:
        """Pack the folder of a notebook, and name the archive in its source.

        Raises UsageError if it is too large, and OSError.
        """
        return await asyncio.to_thread(self._pack, source)

    def _pack(self, source: SourceFiles) -> SourceFiles:
        with self.packing:
            chosen = files.with_base(source, self.out)
            if chosen.base not in self.archive_of:
                digest, archive = files.pack(Path(chosen.base), self.out)
                self.archive_of[chosen.base] = digest
                if digest in self.archives:
                    archive.close()
                else:
                    self.archives[digest] = archive
        return replace(chosen, archive=self.archive_of[chosen.base])

    async def send(self, digest: str, address: str, machine: str) -> None:
        """Send an archive to a machine, by way of the worker at ``address``.

        Raises dask's error if the worker is gone or its disk is full.
        """
        transfer = self.running.get((machine, digest))
        if transfer is None:
            # One transfer for all notebooks that need the archive there.
            transfer = asyncio.create_task(self._send(digest, address))
            self.running[machine, digest] = transfer
        try:
            await asyncio.shield(transfer)
        except Exception:
            self.running.pop((machine, digest), None)
            raise

    async def _send(self, digest: str, address: str) -> None:
        from safe_exec.batch.cluster.task import put_piece

        transfer, archive = uuid.uuid4().hex, self.archives[digest]
        size, bytes_sent = os.fstat(archive.fileno()).st_size, 0
        # Several transfers read one file at a time. After the run the file is closed, and this read
        # fails.
        while data := os.pread(archive.fileno(), files.PIECE_BYTES, bytes_sent):
            bytes_sent += len(data)
            last = bytes_sent >= size
            await self.client.run(put_piece, digest, transfer, data, last, workers=[address])
