"""The kernels that are installed here, with their languages."""

from __future__ import annotations

from safe_exec.kernel.launch import find_spec


def is_installed(name: str) -> bool:
    """Tell whether a kernel of this name is installed."""
    # Importing jupyter_client takes longer than this search, which finds ordinary ipykernels.
    return find_spec(name) is not None or name.lower() in installed_kernels()


def installed_kernels() -> dict[str, str]:
    """Return the language of each installed kernel, by the kernel's name."""
    from jupyter_client.kernelspec import KernelSpecManager

    specs = KernelSpecManager().get_all_specs()
    return {name: str(item["spec"].get("language", "")) for name, item in specs.items()}
