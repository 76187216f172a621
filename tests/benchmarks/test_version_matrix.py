"""The table of versions: the tests it names are there, and what it says of a report and of a row that was not run."""

from benchmarks import version_matrix

REPORT = """<testsuites><testsuite>
<testcase name="test_good"/>
<testcase name="test_bad[1]"><failure message="AssertionError: at 0x7f12 in /home/someone/here/file.py&#10;more"/></testcase>
<testcase name="test_worse"><error message="no such fixture"/></testcase>
<testcase name="test_left_out"><skipped message="needs a compiler"/></testcase>
<testcase name="test_left_out_too"><skipped message="needs a compiler"/></testcase>
</testsuite></testsuites>"""


def test_the_tests_are_there():
    assert [name for name in version_matrix.TESTS if not (version_matrix.ROOT / name).exists()] == []


def test_what_the_table_says(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    found = version_matrix.counts(report)
    assert found == {
        "passed": 1,
        "failed": {"test_bad[1]: AssertionError: at 0x... in .../file.py": 1, "test_worse: no such fixture": 1},
        "skipped": {"needs a compiler": 2},
    }
    text = version_matrix.table(
        {
            "oldest": {"date": "2026-01-02", "versions": {"Python": "3.10.13", "torch": "2.5.1"}, **found},
            "newest": {"why": "no such Python"},
        }
    )
    lines = text.splitlines()
    assert "| oldest | 2026-01-02 | 3.10.13 | 2.5.1 | - | - | - | - | - | 1 | 2 | 2 |" in lines
    assert "- oldest: 2 skipped: needs a compiler" in lines
    assert "- newest: no such Python" in lines
    assert "- pinned: not run" in lines


def test_what_stopped_an_installation():
    log = "Collecting torch\nERROR: Could not find a version\nERROR: No matching distribution found for torch==9\n"
    assert version_matrix.last_error(log) == "ERROR: No matching distribution found for torch==9"
    assert version_matrix.last_error("killed\n") == "killed"
