"""The runner's side of a kernel: it starts the kernel, talks to it, and reads the agent's facts.

The agent, which runs inside the kernel's process, is the package ``agent``. A new fact is observed
there, and checked and stored in ``agent_facts`` here.
"""

from safe_exec.platforms import refuse_elsewhere

# Jupyter loads the provisioner by its entry point and shows the exception. So refuse other systems
# at import time, before a missing module gives an error that nobody understands.
refuse_elsewhere()
