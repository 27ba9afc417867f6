"""Run a batch on the workers of a dask cluster.

Three processes take part. The runner (``scheduler``) submits one dask task per notebook and keeps
the journal. On each dask worker the task (``task``) asks the runner for permission to start, and
has a process forked (``fork_server``) that runs this one notebook (``process``).

Only ``connection``, ``scheduler`` and ``task`` import dask, when they are needed.
"""
