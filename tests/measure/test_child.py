"""A measuring child: one request, one answer, and a sentence where it fails."""

from __future__ import annotations

import pytest

from packlight.errors import MeasurementError
from packlight.measure import child

ECHO = "import json, sys; asked = json.loads(sys.stdin.read()); print('chatter'); print(json.dumps({'got': asked}))"


def test_the_last_line_is_the_answer() -> None:
    request = {"ids": [1, 2], "name": "größer", "none": None}
    assert child.ask(["-c", ECHO], request) == {"got": request}


def test_threads_reach_the_child() -> None:
    code = "import json, os; print(json.dumps({k: os.environ.get(k) for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}))"
    assert child.ask(["-c", code], {}, threads=3) == {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3"}


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise MemoryError('no room')", "ended with code 1: MemoryError: no room"),
        ("import sys; print('first'); print('last'); sys.exit(3)", "ended with code 3: last"),
        ("import sys; sys.exit('a\\nreason')", "ended with code 1: reason"),
        ("import os; os.kill(os.getpid(), 9)", "ended with code -9: nothing"),
        ("pass", "ended with code 0: nothing"),
        ("import sys; print('{}'); sys.exit(1)", "ended with code 1"),
    ],
)
def test_a_child_that_dies(code: str, says: str) -> None:
    with pytest.raises(MeasurementError) as caught:
        child.ask(["-c", code], {})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_child_that_answers_with_something_else() -> None:
    with pytest.raises(MeasurementError):
        child.ask(["-c", "print('garbage')"], {})


def test_a_script_runs_without_packlight() -> None:
    code = "import json, sys; print(json.dumps({'imported': 'packlight' in sys.modules}))"
    assert child.ask(["-P", "-c", code], {}) == {"imported": False}
    assert child.script("stock_load.py").endswith("measure/stock_load.py")
