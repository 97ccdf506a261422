"""Random calls against the reference in float64: tests/fuzz.py says of what."""

import fuzz
import pytest


@pytest.mark.parametrize("seed", range(100))
def test_case(seed):
    try:
        fuzz.run(seed)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{fuzz.describe(seed)}\nalone: python tests/fuzz.py --seed {seed}") from error
