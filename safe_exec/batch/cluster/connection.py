"""Connect to the cluster that ``--cluster`` names, or start it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from safe_exec.errors import ClusterError, UsageError
from safe_exec.files import one_line

if TYPE_CHECKING:
    from distributed import Client

LOCAL = "local"
CONFIGURED = "dask"
ADDRESS_VARIABLE = "DASK_SCHEDULER_ADDRESS"
JOB_QUEUES = {
    "slurm": "SLURMCluster",
    "pbs": "PBSCluster",
    "sge": "SGECluster",
    "lsf": "LSFCluster",
    "htcondor": "HTCondorCluster",
    "oar": "OARCluster",
}
"""The batch systems of dask-jobqueue, with their classes."""
CONNECT_SECONDS = 30


class ClusterAddress(Struct, frozen=True, kw_only=True):
    """The cluster of ``--cluster``: ``kind`` is ``local``, a batch system, ``address`` or ``file``.

    ``count`` is the number of local processes or of jobs.
    """

    text: str
    kind: str
    target: str = ""
    count: int = 0


def parse_cluster(text: str) -> ClusterAddress:
    """Parse the value of ``--cluster``. Raises UsageError."""
    name, colon, number = text.partition(":")
    if name == LOCAL or name in JOB_QUEUES:
        if colon and (not number.isascii() or not number.isdigit() or not int(number)):
            raise UsageError(
                f"--cluster {text}: expected {name}:N with a number from 1 on, found {number!r}"
            )
        return ClusterAddress(text=text, kind=name, count=int(number) if colon else 1)
    if text == CONFIGURED:
        address = os.environ.get(ADDRESS_VARIABLE, "")
        if not address:
            raise UsageError(
                f"--cluster {text}: {ADDRESS_VARIABLE} is not set; set it or give an address"
            )
        return ClusterAddress(text=text, kind="address", target=address)
    if re.match(r"[a-z]+://", text):
        return ClusterAddress(text=text, kind="address", target=text)
    if Path(text).is_file():
        return ClusterAddress(text=text, kind="file", target=text)
    choices = ", ".join(f"{kind}:N" for kind in (LOCAL, *JOB_QUEUES))
    raise UsageError(
        f"--cluster {text}: expected an address such as tcp://host:8786, a scheduler file, "
        f"{choices}, or {CONFIGURED} for the address in {ADDRESS_VARIABLE}"
    )


def demand_dask(address: ClusterAddress) -> None:
    """Raise UsageError if a package for this kind of cluster is missing."""
    modules = ["distributed", *(["dask_jobqueue"] if address.kind in JOB_QUEUES else [])]
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UsageError(
                f"--cluster {address.text}: needs the package {module.replace('_', '-')}: "
                "pip install 'safe-exec[dask]'"
            )


@contextlib.asynccontextmanager
async def connected(address: ClusterAddress, memory: int | None) -> AsyncIterator[Client]:
    """Connect to the cluster; a cluster that this function starts ends with the block.

    ``memory`` is the memory of each local process in bytes. Raises ClusterError.
    """
    import dask
    from distributed import Client

    # dask logs each lost connection with a traceback; what matters to the user is reported by us.
    for name in list(logging.root.manager.loggerDict):
        # Each of its loggers has a level of its own.
        if name.partition(".")[0] == "distributed":
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    dask.config.set({"distributed.comm.timeouts.connect": f"{CONNECT_SECONDS}s"})
    async with contextlib.AsyncExitStack() as stack:
        try:
            if address.kind == "address":
                client = Client(address.target, asynchronous=True, timeout=CONNECT_SECONDS)
            elif address.kind == "file":
                client = Client(
                    scheduler_file=address.target, asynchronous=True, timeout=CONNECT_SECONDS
                )
            else:
                cluster = await stack.enter_async_context(_start(address, memory))
                client = Client(cluster, asynchronous=True, timeout=CONNECT_SECONDS)
            await stack.enter_async_context(client)
        # dask raises whatever its transport does.
        except Exception as error:
            raise ClusterError(
                f"--cluster {one_line(address.text)}: no connection: {one_line(error)}; "
                "check the address, and that the scheduler runs"
            ) from error
        yield client


def _start(address: ClusterAddress, memory: int | None) -> Any:
    """Return a cluster that is about to start."""
    if address.kind == LOCAL:
        import dask
        from distributed import LocalCluster

        # Notebooks run in processes of their own, so dask's profile of its threads shows nothing.
        dask.config.set({"distributed.worker.profile.enabled": False})
        # The dashboard needs bokeh; without it the page is empty.
        has_dashboard = importlib.util.find_spec("bokeh") is not None
        return LocalCluster(
            n_workers=address.count,
            threads_per_worker=1,
            processes=True,
            asynchronous=True,
            dashboard_address="127.0.0.1:0" if has_dashboard else None,
            worker_dashboard_address=None,
            memory_limit=memory or 0,
            silence_logs=50,
        )
    import dask_jobqueue

    cluster = getattr(dask_jobqueue, JOB_QUEUES[address.kind])(asynchronous=True)
    cluster.scale(jobs=address.count)
    return cluster
