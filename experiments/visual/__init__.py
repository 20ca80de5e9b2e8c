"""What a run leaves to look at: plots, image grids, TensorBoard files and the report page."""
