"""Measuring and stress-testing the project: benchmarks, the planner, node checks, experiments. Nothing imports it."""
