"""Many notebooks in one call.

Which ones (``selection``), in what order (``order``), how many at a time (``admission``), each on a thread of its own (``worker``), again or
not (``retries``), on record (``journal``, ``history``, ``fingerprint``), and what it comes to (``outcome``, ``reports``). ``driver`` puts
them together. May import pipeline and what is below; a notebook is run by the very function that ``run`` calls.
"""
