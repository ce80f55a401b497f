"""The planted faults can still be planted: each stands for a line that is there once."""

import pytest
from planted import FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda each: each.name)
def test_the_line_is_there_once(fault: Fault) -> None:
    assert (ROOT / fault.path).read_text().count(fault.right) == 1
    assert (ROOT / "tests" / fault.test.split()[0]).exists()
