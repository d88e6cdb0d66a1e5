"""Figures, tables and pages as text."""

from pathlib import Path

import jinja2


def format_number(value: float | None, digits: int = 4) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def format_interval(metric: dict) -> str:
    return f"{format_number(metric['low'])} to {format_number(metric['high'])}"


def markdown_table(rows: list[list[str]]) -> str:
    head, *body = (" | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) for row in rows)
    return "\n".join(f"| {line} |" for line in (head, " | ".join(["---"] * len(rows[0])), *body))


def render(name: str, **values) -> str:
    """The page `name`, report.md for example, by the template beside this file: report_template.md."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    templates.filters["markdown_table"] = markdown_table
    return templates.get_template(name.replace(".", "_template.")).render(values)
