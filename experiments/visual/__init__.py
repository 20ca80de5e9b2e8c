"""Plots, image grids, TensorBoard event files, and the layout of the report."""
