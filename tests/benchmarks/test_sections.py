import importlib

import pytest


@pytest.fixture
def sections(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    return importlib.import_module("sections")


def test_a_section_is_rewritten_and_others_stay(sections, tmp_path):
    page = tmp_path / "page.md"
    sections.write_section(page, "one", "first")
    sections.write_section(page, "two", "second")
    before = page.read_text()
    sections.write_section(page, "one", "changed\n")
    assert page.read_text() == before.replace("first", "changed")
    assert before.index("first") < before.index("second")
