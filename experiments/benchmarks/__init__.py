"""How fast the project is, and how its attacks compare with those of other libraries."""
