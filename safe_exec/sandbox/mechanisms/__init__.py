"""One file per mechanism that enforces limits or isolation, the strongest of which wins.

A limit is added to the ``offer`` of each mechanism that can enforce it. ``planner`` asks them.
"""
