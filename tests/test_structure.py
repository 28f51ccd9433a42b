"""Check the layers of files: each imports only lower layers, rules also rules, and never in a circle."""

import ast

import pytest
from testing import ROOT

SCRIPTS = {"send_queue_server", "outreach_server", "dispatcher", "outreach", "status", "alert"}
RULES = {
    "pacing",
    "forecast",
    "repeats",
    "report",
    "batches",
    "handles",
    "templates",
    "unusual",
    "values",
    "screens",
    "terminal",
    "import_columns",
    "importing",
    "last_checks",
    "metrics",
    "spreadsheet",
    "audience",
    "audience_rows",
    "client_fields",
    "composing",
    "compositions",
    "recipients",
    "settings",
    "zones",
    "quiet_times",
    "choosing",
    "contacts",
    "history",
    "snapshots",
    "recipient_groups",
    "recipient_zones",
    "opt_outs",
    "pausing",
    "previews",
    "people",
    "setting_fields",
    "personal_data",
    "uploads",
}
PAGES = {
    "page",
    "page_templates",
    "page_check",
    "page_import",
    "page_login",
    "page_new",
    "page_today",
    "page_batch",
    "page_people",
    "page_settings",
    "sessions",
}
FOUNDATION = {"serving", "db", "runtime"}
OURS = SCRIPTS | PAGES | RULES | FOUNDATION


def imports_of(module: str) -> set[str]:
    """Return the product's modules that a module imports, also inside a function."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found & OURS


def test_each_module_has_one_layer() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == OURS


@pytest.mark.parametrize("module", sorted(OURS))
def test_no_module_imports_a_higher_layer(module: str) -> None:
    below = FOUNDATION if module in FOUNDATION else FOUNDATION | RULES
    below |= PAGES if module in PAGES or module == "outreach_server" else set()
    assert imports_of(module) <= below


def test_no_circular_imports() -> None:
    left = {module: imports_of(module) for module in OURS}
    while free := [module for module, imports in left.items() if not imports & set(left)]:
        for module in free:
            del left[module]
    assert not left
