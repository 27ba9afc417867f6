"""One module per report format; each reads a verdict, or the stream of events, and nothing else.

For one run: ``verdict_json`` (the document), ``annotated_notebook``, ``terminal`` (the diagnosis),
``progress`` (the display during the run) and ``event_log`` (JSON lines). For a batch: the modules
in ``batch``, which read ``batch.results``, with one per CI system in ``batch.ci``. ``text`` holds
wording that the reports for people share; ``masking`` hides secrets.
"""
