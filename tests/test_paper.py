"""The table as printed, and its arithmetic against counts made by hand."""

import numpy as np
import pytest
from scipy import stats

from ilora.study import paper


def test_the_table_has_nine_systems_on_three_data_sets():
    table = paper.table()
    assert table.groupby("dataset")["system"].nunique().to_dict() == dict.fromkeys(paper.SEQUENCES, 9)
    cell = table.set_index(["dataset", "system"]).loc[("MovieLens", "LLaRA")]
    assert (cell["valid_ratio"], cell["hit_ratio"], cell["imp"], cell["n"]) == (0.9684, 0.4421, 19.32, 95)
    assert table["imp"].isna().sum() == 3


def test_a_ratio_is_a_count():
    assert paper.counts(0.4421, 95) == [42]
    assert paper.counts(0.9684, 95) == [92]
    assert paper.counts(0.5275, 95) == []  # iLoRA on MovieLens is no share of the 95 test rows
    assert (48, 91) in paper.divisors(0.5275, 95)


def test_intervals_and_p_values():
    low, high = paper.wilson(0.5, 122)
    z = stats.norm.ppf(0.975)
    half = z / (122 + z**2) * np.sqrt(122 / 4 + z**2 / 4)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))
    found = paper.audit()
    assert found["p"].round(2).to_dict() == {"LastFM": 0.44, "MovieLens": 0.24, "Steam": 0.12}
    assert paper.together(found["p"]) == pytest.approx(0.044, abs=0.001)
    z = stats.norm.isf(found["p"] / 2).sum() / np.sqrt(3)
    assert paper.together(found["p"]) == pytest.approx(2 * stats.norm.sf(z))


def test_one_improvement_does_not_follow_from_the_table():
    found = paper.improvements()
    assert len(found) == 24
    odd = found[found["differs"]]
    assert odd[["dataset", "system", "imp", "computed"]].values.tolist() == [["LastFM", "LLaRA", 8.51, 10.91]]
