"""A kernel command for any Jupyter client: a proxy in front of a real kernel in a sandbox.

``wire`` parses and signs messages, ``sockets`` is a ZMTP server, ``front`` holds the five public
sockets, ``inner`` runs one sandboxed kernel, ``diagnosis`` explains its death, ``proxy`` connects
clients and kernel, and ``recording`` keeps the executed cells.
"""
