"""The table as printed, and its arithmetic against counts made by hand and textbook formulas."""

import pytest

from ilora.study import paper

pytestmark = pytest.mark.book


def test_the_table_has_nine_systems_on_three_data_sets():
    table = paper.printed_results()
    assert table.groupby("dataset")["system"].nunique().to_dict() == dict.fromkeys(paper.SEQUENCES, 9)
    cell = table.set_index(["dataset", "system"]).loc[("MovieLens", "LLaRA")]
    assert (cell["valid_ratio"], cell["hit_ratio"], cell["imp"], cell["n"]) == (0.9684, 0.4421, 19.32, 95)
    assert table["imp"].isna().sum() == 3


@pytest.mark.parametrize(("ratio", "counts"), [(0.4421, [42]), (0.9684, [92]), (0.5275, [])])  # of 95 test sequences
def test_a_ratio_implies_a_count(ratio, counts):
    assert paper.possible_counts(ratio, 95) == counts


def test_one_improvement_does_not_follow_from_the_table():
    table = paper.improvements()
    assert len(table) == 24
    odd = table[table["differs"]]
    assert odd[["dataset", "system", "imp", "computed"]].values.tolist() == [["LastFM", "LLaRA", 8.51, 10.91]]
