"""Results as data: a manifest of rows, the JSON of each, and the page made of them."""
