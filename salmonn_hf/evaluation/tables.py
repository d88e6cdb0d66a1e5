"""Figures and tables as text."""


def format_number(value: float | None, digits: int = 4) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def format_interval(metric: dict) -> str:
    return f"{format_number(metric['low'])} to {format_number(metric['high'])}"


def markdown_table(rows: list[list[str]]) -> str:
    head, *body = (" | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) for row in rows)
    return "\n".join(f"| {line} |" for line in (head, " | ".join(["---"] * len(rows[0])), *body))
