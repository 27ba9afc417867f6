"""Reports: one module per format, each of which reads a verdict (or the stream of events) and nothing else.

On a run: ``verdict_json`` the document, ``annotated`` the notebook, ``terminal`` the diagnosis, ``progress`` what is seen
before it, ``event_log`` the run as JSON lines. On a batch, of which ``entries`` is all they know: ``junit``, ``github``,
``gitlab``, and ``page``, the HTML page, with ``page_data``; ``places`` finds a line of a cell in the notebook's file.
``text``, ``culprit_text``, ``batch_text`` and ``markdown`` are what those for people share. They import ``model``, ``events``,
``errors``, ``units``, ``files`` and the names that ``notebook`` gives our marks.
"""
