"""Tables in Markdown."""


def table(header: list[str], rows: list[list]) -> str:
    """Format a header and rows; every cell becomes its `str`."""
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
