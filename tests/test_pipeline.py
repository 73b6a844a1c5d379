"""What the steps of the notebooks make is found again by what it was made from."""

import pytest

from ilora import data, pipeline, runs
from ilora.recommenders import SASRec


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Parameters by which an adapter tuned with these settings is kept, without tuning it."""
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    source = data.load("world", users=40)
    encoder = SASRec(len(source.items))

    def parameters(**settings):
        kept = []
        monkeypatch.setattr(runs, "cached", lambda kind, parameters, make, note="": kept.append(parameters) or tmp_path)
        pipeline.tuned_folder(source, encoder, **settings)
        return kept[0]

    return parameters


def test_what_is_left_at_its_default_keeps_the_name_that_it_had(asked):
    gate = {"gate": "linear", "guidance": "sequence", "gate_per_layer": False, "gate_top_k": 0}
    adapter = {"rank", "alpha", "dropout", "experts"}
    names = asked(experts=4, **gate).keys()
    assert names & {*adapter, *gate} == {*adapter, "gate"}
    other = asked(experts=4, **gate | {"gate_per_layer": True, "gate_top_k": 2, "guidance": "random"})
    assert other.keys() - names == {"gate_per_layer", "gate_top_k", "guidance"}
    ignored = {"gate_per_layer": True, "gate_top_k": 2, "guidance": "random"}
    assert asked(experts=1, **ignored) == asked(experts=1)  # LoRA has no gate
