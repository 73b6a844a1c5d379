"""Recommenders on item ids, and their training."""

from ilora.recommenders.base import Recommender, SequenceModel
from ilora.recommenders.baselines import Caser, GRU4Rec, Popularity
from ilora.recommenders.morec import MoRec
from ilora.recommenders.sasrec import SASRec
from ilora.recommenders.training import EPOCHS, GRID, choose_regularisation, fit_recommender
