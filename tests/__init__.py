"""A package, because a library (torch-fidelity) installs one of the same name, which Python would take instead."""
