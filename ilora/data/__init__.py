"""Data sets in one form, their sources, and windows, candidates and questions made from them."""

from ilora.data.dataset import CANDIDATES, MIN_HISTORY, SPLITS, Dataset, load_dataset
from ilora.data.loading import REPEATS, WORDS, load, source_key
from ilora.data.windows import Questions, Sequences, candidates, questions, sequences
from ilora.data.world import World, make_world
