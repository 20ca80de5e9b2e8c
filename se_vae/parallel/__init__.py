"""Placement of arrays on devices, and agreement between the processes of several hosts."""
