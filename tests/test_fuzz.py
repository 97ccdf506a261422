"""Random calls against the reference in float64: tests/fuzz.py says of what."""

import fuzz
import pytest

# Results of attention_stats in the first level's dtype; float64 tokens of masked_features on narrower features.
MIXED_DTYPES = pytest.mark.xfail(raises=ValueError, reason="float64 beside another dtype is not converted yet")


@pytest.mark.parametrize("seed", [pytest.param(i, marks=MIXED_DTYPES if i in (47, 78) else ()) for i in range(100)])
def test_case(seed):
    try:
        fuzz.run(seed)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{fuzz.describe(seed)}\nalone: python tests/fuzz.py --seed {seed}") from error
