"""A kernel in a sandbox, the client that talks to it, and the agent inside it."""

from safe_exec.platforms import refuse_elsewhere

# Jupyter loads the provisioner by its entry point and shows the exception. So refuse other systems
# at import time, before a missing module gives an error that nobody understands.
refuse_elsewhere()
