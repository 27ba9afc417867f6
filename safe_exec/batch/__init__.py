"""Run many notebooks in one call.

``scheduler`` puts the other modules together: which notebooks run (``selection``), in what order
(``ordering``), how many at a time (``admission``), each on its own thread (``worker``), whether a
failure is tried again (``workflows.retry``), what is recorded (``journal``, ``history``,
``fingerprint``), the result (``outcome``), and its reports (``report_registry``, and ``ci`` for the
CI system that runs the batch). Each notebook runs through the same function as ``safe-exec run``.
"""
