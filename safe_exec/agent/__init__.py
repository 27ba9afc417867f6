"""The code that runs inside a Python kernel: it reports facts that a dead process no longer can.

It uses the standard library only. ``bootstrap.py`` starts it by path, before the kernel's own
command, in an environment where safe-exec need not be installed. The package has another name
there, so its modules import each other relatively, and nothing else of ours. It reports to the
outside in three ways, all on descriptors that it was given:

- *page*: shared memory. The header holds the running statement and the last sample; two segments
  behind it hold the text written to stdout and stderr and every display, before ipykernel queues
  them. This memory survives its writer: SIGKILL discards ipykernel's buffers (the last 0.2 s), but
  the runner reads the output from here.
- *facts*: a datagram socket for rare events: the file name of each cell, connections to other
  hosts, the caller of ``os._exit``, and the read ends of the pipes that ipykernel puts over
  descriptors 1 and 2.
- *fault*: the descriptor that faulthandler writes to. ipykernel's own stderr is a pipe that the
  same process reads, so text written there during a crash is lost.

A new fact is sent with ``Inside.fact`` from the module that observes it, and checked in
``kernel/agent_facts.py``.

Nothing here may change a notebook's view of its kernel. A patch that does not fit the installed
ipykernel is left out and reported.
"""
