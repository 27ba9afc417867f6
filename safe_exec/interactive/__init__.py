"""A kernel that any Jupyter client starts by its command, in front of a real kernel in a sandbox.

``wire`` knows messages, ``sockets`` is the public end of the protocol of ZeroMQ, ``front`` the five
public sockets with their clients, ``requests`` the requests that wait for a reply, ``inner`` one
sandboxed kernel from its start to its end, ``diagnosis`` the last word on one that died, ``proxy``
joins them, and ``recording`` keeps the cells that were executed.
"""
