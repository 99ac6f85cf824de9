from benchmarks.sections import write_section


def test_a_section_is_rewritten_and_others_stay(tmp_path):
    page = tmp_path / "page.md"
    write_section(page, "one", "first")
    write_section(page, "two", "second")
    before = page.read_text()
    write_section(page, "one", "changed\n")
    assert page.read_text() == before.replace("first", "changed")
    assert before.index("first") < before.index("second")
