"""What runs inside a Python kernel's process: it leaves on record what the process will not be able to say once it dies.

Standard library only: started by path (``bootstrap.py``), in front of the kernel's own command, in an environment where safe-exec need not be
installed. There the package has another name, so its modules import each other relatively, and nothing of ours but each other. It speaks to
the outside in three ways, all on descriptors it was given:

- *page*: shared memory. Its header holds the statement that runs now and what a sampling thread saw last; two segments
  behind it hold what was written to stdout and stderr and every display, before ipykernel queues it. Memory outlives its writer:
  what a SIGKILL takes from ipykernel's buffers (its last 0.2 s) the runner reads from here.
- *facts*: a datagram socket for rare things: which file name belongs to which cell, connections to other hosts, who called
  ``os._exit``, and the read ends of the pipes that ipykernel puts over descriptors 1 and 2.
- *fault*: where faulthandler writes. ipykernel's own stderr is a pipe that the same process reads, so what is written there while
  dying is lost.

Nothing here may change what a notebook sees. Whatever does not fit the ipykernel at hand is left out and reported.
"""
