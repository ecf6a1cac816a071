"""The HTTP interface: one file for each family of routes."""
