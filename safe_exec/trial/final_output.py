"""Collects the last output of a dead kernel, in order and with its age at the death.

May import kernel and model.

There are two sources. The keeper has the output of native code and children on the process's own
descriptors, with the time of each burst; data that ipykernel's thread had not read yet was found in
its pipe and was written last. The client has the text of the running cell: the output of Python
code, and the same native output once more. Output that never arrived over the wire was recovered
from shared memory after the death.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safe_exec.model.evidence import Channel, OutputBurst

if TYPE_CHECKING:
    from safe_exec.kernel.session import KernelSession

STREAMS = {"stdout": Channel.STDOUT, "stderr": Channel.STDERR}
# Text that was still in the pipes belongs to a burst from at most this many seconds before: the
# reading thread had taken its beginning.
SAME_BURST_SECONDS = 0.2


def final_output(session: KernelSession) -> tuple[OutputBurst, ...]:
    """Return the last bursts of output before the end; empty for a kernel that has not ended."""
    ended, client = session.ended, session.client
    if ended is None:
        return ()
    # A large process takes a while to end, and the fault handler to report: what counts is when it
    # began to die.
    end = ended.at if ended.fault_at is None else ended.fault_at
    native = [
        OutputBurst(channel=Channel.DESCRIPTOR, text=text, age=max(0.0, end - at))
        for at, text in ended.bursts
    ]
    waiting = "".join(client.residue.get(name, "") for name in STREAMS)
    if waiting:
        beginning = native.pop().text if native and native[-1].age <= SAME_BURST_SECONDS else ""
        native.append(OutputBurst(channel=Channel.DESCRIPTOR, text=beginning + waiting, age=0.0))
    texts = [
        (at, STREAMS[name], text) for at, name, text in client.accounts.texts if name in STREAMS
    ]
    return (
        *native,
        *(
            OutputBurst(channel=channel, text=text, age=max(0.0, end - at))
            for at, channel, text in texts
        ),
    )
