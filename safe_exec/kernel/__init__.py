"""A kernel in a sandbox, the client that talks to it, and the reader of the agent's facts.

The agent itself, which runs inside the kernel's process, is the package ``agent``.
"""

from safe_exec.platforms import refuse_elsewhere

# Jupyter loads the provisioner by its entry point and shows the exception. So refuse other systems
# at import time, before a missing module gives an error that nobody understands.
refuse_elsewhere()
