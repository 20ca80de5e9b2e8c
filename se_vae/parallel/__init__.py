"""Devices and processes: how arrays are placed on them, and what several hosts agree on."""
