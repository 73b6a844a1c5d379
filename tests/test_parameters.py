"""Parameters of notebooks and the errors of wrong ones."""

import pytest

from ilora.errors import UserError
from ilora.study.parameters import check_parameters, parse_parameters, start

pytestmark = pytest.mark.book

PARAMETERS_CELL = 'dataset = "world"  # which\nseed = 0\nrank = 8\nalpha = 32\nexperts = 4\ndata_dir = ""'


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def notebook_globals(*cells):
    """What a notebook's globals hold when the cell that calls start runs, after `cells`."""
    namespace = {"In": [""], "Out": {}, "get_ipython": print, "exit": exit}
    for cell in cells:
        exec(cell, namespace)
    return namespace


REFUSED = [
    ({"expert": 4}, "there is no parameter 'expert': did you mean 'experts'?"),
    ({"zzz": 4}, "there is no parameter 'zzz': the parameters are dataset, data_dir"),
    ({"experts": 4.0}, "'experts' must be a whole number, not 4.0 (float)"),
    ({"experts": "4.0"}, "'experts' must be a whole number, not '4.0' (str)"),
    ({"epochs": True}, "'epochs' must be a whole number, not True (bool)"),
    ({"alpha": False}, "'alpha' must be a number, not False (bool)"),
    ({"data_dir": 2024}, "'data_dir' must be text, not 2024 (int) (papermill: -r data_dir 2024"),
    ({"seed": None}, "'seed' must be a whole number, not None (NoneType)"),
    ({"epochs": -1}, "'epochs' must be at least 1, not -1"),
    ({"users": 39}, "'users' must be at least 40, not 39"),
    ({"conflict": 1.5}, "'conflict' must be from 0 to 1, not 1.5"),
    ({"conflict": float("nan")}, "'conflict' must be from 0 to 1, not nan"),
    ({"learning_rate": 0}, "'learning_rate' must be above 0 and below 1, not 0.0"),
    ({"dropout": 1}, "'dropout' must be from 0 to below 1, not 1.0"),
    ({"alpha": float("inf")}, "'alpha' must be above 0, not inf"),
    ({"dataset": "wrold"}, "must be one of world, movielens, lastfm, steam, llara, csv, not 'wrold'"),
    ({"eval_windows": "some"}, "'eval_windows' must be one of last, all, not 'some'"),
    ({"data_dir": "/no/such/folder"}, "'data_dir' must be empty or a folder that exists"),
    ({"base_model": " "}, "'base_model' must be 'embedded', 'smollm2' or"),
    (
        {"experts": 3, "rank": 8},
        "experts = 3 does not divide rank = 8: choose experts among 1, 2, 4, 8",
    ),
    ({"gate_per_layer": "true"}, "'gate_per_layer' must be True or False, not 'true' (str)"),
    ({"gate_per_layer": 1}, "'gate_per_layer' must be True or False, not 1 (int)"),
    ({"quantize": "2bit"}, "'quantize' must be empty or, after `pip install bitsandbytes`, 8bit or 4bit, not '2bit'"),
    ({"micro_batch_size": -1}, "'micro_batch_size' must be at least 0, not -1"),
    ({"gate_top_k": 1}, "'gate_top_k' must be 0 or at least 2, not 1"),
    ({"gate_top_k": 4, "experts": 2}, "gate_top_k = 4 keeps more than experts = 2: choose at most that many, or 0"),
    ({"dataset": "csv", "data_dir": ""}, "dataset = 'csv' needs data_dir"),
    ({"device": "gpu"}, "device must be auto, cpu, cuda, cuda:N or mps, not 'gpu'"),
    ({"device": "cuda:x"}, "device must be auto, cpu, cuda, cuda:N or mps, not 'cuda:x'"),
    ({"device": "cuda:99"}, "device 'cuda:99' is not on this machine"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[str(given) for given, _ in REFUSED])
def test_a_wrong_parameter_is_refused_in_one_line(given, message):
    with pytest.raises(UserError) as error:
        check_parameters(given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_whole_number_is_accepted_where_a_number_is_meant_and_becomes_one():
    values = check_parameters({"alpha": 32, "rank": 8})
    assert values == {"alpha": 32.0, "rank": 8}
    assert type(values["alpha"]) is float


def test_command_line_pairs_are_read_by_type():
    pairs = [("experts", "2"), ("alpha", "16"), ("data_dir", ""), ("dataset", "world")]
    assert parse_parameters(pairs) == {"experts": 2, "alpha": 16.0, "data_dir": "", "dataset": "world"}
    for text, value in (("True", True), ("False", False)):
        assert parse_parameters([("gate_per_layer", text), ("gate_top_k", "4")]) == {
            "gate_per_layer": value,
            "gate_top_k": 4,
        }
    wrong = [(("experts", "4.0"), "a whole number, not 4.0"), (("expert", "4"), "'experts'?")]
    for pair, message in [*wrong, (("gate_per_layer", "no"), "True or False, not 'no'")]:
        with pytest.raises(UserError, match=message):
            parse_parameters([pair])


def test_start_returns_checked_parameters_and_puts_them_in_the_notebook():
    namespace = notebook_globals(PARAMETERS_CELL, "# Parameters\nexperts = 2\n")
    run = start("04_ilora", namespace)
    assert run.parameters == {
        "dataset": "world", "data_dir": "", "seed": 0, "rank": 8, "alpha": 32.0, "experts": 2
    }  # fmt: skip
    assert type(namespace["alpha"]) is float


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        ("expert = 4", "there is no parameter 'expert' in 04_ilora: did you mean 'experts'?"),
        ("expert = None", "there is no parameter 'expert' in 04_ilora: did you mean 'experts'?"),
        ("results = 'x'", "there is no parameter 'results' in 04_ilora: the parameters are dataset, data_dir, repeats"),
        ("experts = 3", "experts = 3 does not divide rank = 8"),
    ],
)
def test_start_refuses_what_papermill_injects_wrongly(injected, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        start("04_ilora", notebook_globals(PARAMETERS_CELL, f"# Parameters\n{injected}\n"))


def test_start_sees_a_misspelt_name_in_the_parameters_cell_until_it_is_corrected():
    namespace = notebook_globals("seed = 0\nrnak = 8")
    with pytest.raises(UserError, match="did you mean 'rank'"):
        start("04_ilora", namespace)
    exec("rank = 8", namespace)
    assert start("04_ilora", namespace).parameters == {"seed": 0, "rank": 8}


def test_start_can_be_run_again_in_a_live_notebook():
    """Other cells have run since, whose variables are no parameters; a changed parameter counts."""
    namespace = notebook_globals(PARAMETERS_CELL)
    namespace["run"] = start("04_ilora", namespace)
    exec("answer, experts, title = 42, 8, 'x'", namespace)
    assert start("04_ilora", namespace).parameters == namespace["run"].parameters | {"experts": 8}


def test_start_of_a_notebook_elsewhere_knows_all_parameters():
    assert start("my_own", notebook_globals("results = '.'\nrank = 8")).parameters == {"results": ".", "rank": 8}
