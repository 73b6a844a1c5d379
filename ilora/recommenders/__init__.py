"""Recommenders on item ids, and their training."""
# ruff: noqa: F401

from ilora.recommenders.base import Recommender, SequenceModel
from ilora.recommenders.caser import Caser
from ilora.recommenders.gru4rec import GRU4Rec
from ilora.recommenders.morec import MoRec
from ilora.recommenders.popularity import Popularity
from ilora.recommenders.sasrec import SASRec
from ilora.recommenders.training import EPOCHS, GRID, choose_regularisation, fit_recommender
