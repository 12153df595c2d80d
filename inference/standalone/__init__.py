"""A routed mixture as a folder that loads without this repository."""
