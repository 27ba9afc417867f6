"""A fresh Debian of another release, without a virtual machine: only kernel and network are the host's."""
