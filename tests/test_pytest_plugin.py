"""The plugin in a vendor's own repository: every test here is a pytest session of its own, in this process but for
one that starts more."""

from __future__ import annotations

import datetime
import os

import pytest

import dsv4_hal.conformance.judging.verdict  # noqa: F401  (or each session here would import it, and its processes, anew)

pytest_plugins = ["pytester"]

FAULTY = """
import os, time
from dsv4_hal.backends.reference import Reference

class Faulty(Reference):
    name = "faulty"

    def hadamard(self, x):  # a case of each kind of trouble, by its width
        width = x.shape[-1]
        if width == 1:
            os._exit(3)
        if width == 2:
            time.sleep(60)
        return super().hadamard(x) * (1.5 if width == 64 else 1)
"""
DAY, LAST = (datetime.date.today() + datetime.timedelta(days) for days in (-4, 30))
FIXED, LATER, UNFIXED = "hadamard[tokens=5", "hadamard[tokens=", "hadamard[tokens=3,heads=1,width=64]"


@pytest.fixture
def outside() -> dict[str, str]:
    """The environment before pytester changes it."""
    return dict(os.environ)


@pytest.fixture
def vendor(outside: dict[str, str], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A vendor's repository: a backend that is installed, a conftest.py, a test."""
    for name in ("HOME", "USERPROFILE", "PY_COLORS"):  # with others than before, processes would be started afresh
        monkeypatch.delenv(name)
        if name in outside:
            monkeypatch.setenv(name, outside[name])
    site = pytester.mkdir("site")
    facts = site / "third_vendor-1.0.dist-info"
    facts.mkdir()
    (site / "faulty_module.py").write_text(FAULTY)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: third-vendor\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[dsv4_hal.backends]\nfaulty = faulty_module:Faulty\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # each session would import hypothesis, for seconds
    pytester.makeconftest('pytest_plugins = ["dsv4_hal.pytest_plugin"]')
    pytester.makepyfile(test_contract="def test_contract(conformance_outcome):\n    assert conformance_outcome.ok\n")
    return pytester


def waive(vendor: pytest.Pytester, *cases: str) -> None:
    text = "".join(
        f"- {{case: '{case}', mode: exact, reason: fixed in driver 25.3, date: {DAY}, expires: {LAST}}}\n"
        for case in cases
    )
    (vendor.path / "site" / "waivers.yaml").write_text(text)


def session(vendor: pytest.Pytester, *options: str) -> pytest.RunResult:
    run = vendor.runpytest_subprocess if "-n" in options else vendor.runpytest_inprocess
    return run("--dsv4-backend", "faulty", "--dsv4-mode", "exact", *options)


def test_every_case_is_a_test(vendor: pytest.Pytester) -> None:
    waive(vendor, UNFIXED)
    result = session(vendor, "--dsv4-op", "hadamard", "--dsv4-limit", "4", "-v", "-rx")
    result.assert_outcomes(passed=6, failed=2, xfailed=1)
    for line in (
        "::test_contract[hadamard[tokens=0,heads=4,width=128]@exact] PASSED",
        "crash: the process of backend faulty ended with exit code 3",
        'again: dsv4-hal conform --backend faulty -p "hadamard[tokens=3,heads=1,width=1]@exact"',
        "timeout: no result after 4.0 s",
        f"waived {DAY} (fixed in driver 25.3): y: nmse ",
        "faulty: 1 native op of the 1 that ran; 9 cases: 6 agrees, 1 crash, 1 timeout, 1 waived; size classes",
    ):
        assert line in result.stdout.str(), line


def test_stale_waivers_fail_the_session(vendor: pytest.Pytester) -> None:
    """Under pytest-xdist too; and only where every case of a waiver ran."""
    waive(vendor, FIXED, LATER, UNFIXED)
    result = session(vendor, "--dsv4-op", "hadamard", "-k", "128", "-p", "xdist", "-n", "2")
    result.assert_outcomes(passed=4)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    told = [line for line in result.stdout.lines if "stale waiver" in line]
    assert len(told) == 1 and f"stale waiver: {FIXED} of {DAY}: no case of it fails" in told[0]


def test_what_does_not_run_says_why(vendor: pytest.Pytester) -> None:
    code = FAULTY.replace('name = "faulty"', 'name = "faulty"\n    affords = "tiny"')
    (vendor.path / "site" / "faulty_module.py").write_text(code)
    result = session(vendor, "--dsv4-op", "hc_post", "-rs")
    assert result.parseoutcomes().keys() == {"passed", "skipped"}
    assert "a case of size quick: the backend affords tiny at most" in result.stdout.str()


def test_a_backend_that_cannot_be_used_fails_every_test(vendor: pytest.Pytester) -> None:
    (vendor.path / "site" / "faulty_module.py").write_text("raise OSError('libfaulty.so')")
    result = session(vendor, "--dsv4-op", "hadamard")
    result.assert_outcomes(errors=9)
    assert "backend faulty does not load: OSError: libfaulty.so" in result.stdout.str()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "name a backend: --dsv4-backend NAME, or dsv4_backend in the ini file"),
        (("--dsv4-backend", "faulty", "--dsv4-op", "hadamart"), "no op or family is called 'hadamart'; did you mean"),
        (("--dsv4-backend", "faulty", "--dsv4-pattern", "nothing"), "no case has 'nothing' in its id"),
    ],
)
def test_no_choice_is_an_empty_one(vendor: pytest.Pytester, options: tuple[str, ...], told: str) -> None:
    result = vendor.runpytest_inprocess(*options)
    result.assert_outcomes(errors=1)
    assert told in result.stdout.str() and "Traceback" not in result.stdout.str()


def test_the_limit_is_that_of_conform(vendor: pytest.Pytester) -> None:
    for limit in ("0", "nan", "1e9", "soon"):
        result = vendor.runpytest_inprocess("--dsv4-limit", limit)
        assert f"--dsv4-limit: must be 0.1 to 86400 seconds, got {limit}" in result.stderr.str()


def test_a_backend_of_which_nothing_is_judged_fails_the_session(vendor: pytest.Pytester) -> None:
    refuses = "    def supports(self, op, facts):\n        return Verdict(False, 'not today')\n"
    code = "from dsv4_hal.backend import Verdict\n" + FAULTY + refuses
    (vendor.path / "site" / "faulty_module.py").write_text(code)
    result = session(vendor, "--dsv4-pattern", "hadamard[tokens=5,heads=4,width=128]")
    assert result.parseoutcomes().keys() == {"passed"} and result.ret == pytest.ExitCode.TESTS_FAILED
    assert "nothing of it was judged" in result.stdout.str()


def test_without_the_fixture_nothing_is_asked(vendor: pytest.Pytester) -> None:
    vendor.makepyfile(test_contract="def test_other():\n    pass\n")
    vendor.runpytest_inprocess().assert_outcomes(passed=1)
