"""One self-contained page for a finished run: opens from disk, needs no network, treats model text as data."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from harness import numbers
from harness.report_parts.run_data import RunData, read_run

TEMPLATES = Path(__file__).parent / "templates"
MAX_PAGE_BYTES = 950_000
ROOMS = (1.0, 0.5, 0.2, 0.05)  # shares of the usual space that recall blocks and sample texts get in turn


def render_report(run: RunData) -> str:
    """The page as HTML. Same run, same bytes: nothing in it depends on when or where it is made.

    Every value passes jinja2's autoescape; a content security policy allows the page's own script (by hash) and style
    and nothing else, so that text which slipped through could neither run nor load anything. A page that would pass
    MAX_PAGE_BYTES is made again with fewer recall blocks and samples, and says so; scores and verdicts stay whole.
    """
    for room in ROOMS:
        page = _render(page_view(run, room))
        if len(page.encode()) <= MAX_PAGE_BYTES:
            break
    return page


def _render(view: dict[str, Any]) -> str:
    import jinja2
    from markupsafe import Markup

    from harness.report_parts.text import visible

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
    )
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        view=view,
        dash=numbers.NOT_MEASURED,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'",
    )


def write_report(run_folder: Path) -> Path:
    """Write report.html into the run folder, whole or not at all; returns its path."""
    path = run_folder / "report.html"
    temporary = path.with_name(".report.html.partial")
    try:
        temporary.write_text(render_report(read_run(run_folder)), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def page_view(run: RunData, room: float = 1.0) -> dict[str, Any]:
    """Everything that the template shows, already in words and drawings. room: see ROOMS."""
    from harness.report_parts import scores_section
    from harness.report_parts.comparison_section import comparison_view
    from harness.report_parts.manifest_section import flat_rows
    from harness.report_parts.needle_section import colour, needle_maps
    from harness.report_parts.recall_section import recall_view
    from harness.report_parts.sample_section import disagreement_view, error_view
    from harness.report_parts.token_section import token_blocks

    results = run.results
    comparison = comparison_view(results, run.comparison) if run.comparison else None
    needle = needle_maps(results)
    headline = scores_section.headline_blocks(results, run.comparison)
    return {
        "name": results["name"],
        "digest": results["digest"],
        "commit": results["commit"],
        "device": results["device"],
        "created": results["created"],
        "variants": [
            {"name": name, "series": series, "settings": _settings_of(run, name)}
            for series, name in enumerate(results["variants"])
        ],
        "num_tasks": len(results["tasks"]),
        "num_samples": numbers.count(len(run.samples)),
        "comparison": comparison,
        "headline": headline,
        "limit_lowered": any(row["limit_lowered"] for block in headline for row in block["rows"]),
        "other_metrics": scores_section.other_metrics(results, run.comparison),
        "group_tables": scores_section.group_tables(results),
        "needle": needle,
        "needle_colours": [colour(place / 8) for place in range(9)],
        "recall": recall_view(run, room) if results["recall"] else None,
        "tokens": token_blocks(run),
        "disagreements": disagreement_view(run, room),
        "errors": error_view(run),
        "settings": flat_rows(run.settings) if run.settings else [],
        "manifest": flat_rows(run.manifest),
    }


def _settings_of(run: RunData, variant: str) -> str:
    """A variant's settings in a few words: "every key" for dense, "k = 128, oracle" for others."""
    settings = ((run.settings or {}).get("variants") or {}).get(variant)
    if not isinstance(settings, dict):
        return ""
    rest = {key: value for key, value in settings.items() if key != "topk" and value is not None}
    topk = settings.get("topk")
    words = ["every key" if topk is None else f"k = {numbers.count(topk)}"]
    return ", ".join([*words, *(str(v) if key == "selector" else f"{key} {v}" for key, v in rest.items())])
