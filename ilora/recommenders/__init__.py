"""Recommenders on item ids, and their training."""

from ilora.recommenders.base import Recommender, SequenceModel
from ilora.recommenders.caser import Caser
from ilora.recommenders.gru4rec import GRU4Rec
from ilora.recommenders.morec import MoRec
from ilora.recommenders.popularity import Popularity
from ilora.recommenders.sasrec import SASRec
from ilora.recommenders.training import EPOCHS, GRID, choose_regularisation, fit_recommender

__all__ = ["EPOCHS", "GRID", "Caser", "GRU4Rec", "MoRec", "Popularity", "Recommender", "SASRec", "SequenceModel",
           "choose_regularisation", "fit_recommender"]  # fmt: skip
