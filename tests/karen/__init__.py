"""A package, so that its conftest is not in the way of the other one."""
