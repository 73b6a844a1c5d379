"""The one form of data, its sources, and the windows and candidates of it."""

from ilora.data.dataset import CANDIDATES, MIN_HISTORY, REPEATS, WORDS, Dataset, load, load_dataset, source_key
from ilora.data.tables import SPLITS
from ilora.data.windows import Questions, Sequences, candidates, questions, sequences
from ilora.data.world import World, make_world

__all__ = [
    "CANDIDATES",
    "MIN_HISTORY",
    "REPEATS",
    "SPLITS",
    "WORDS",
    "Dataset",
    "Questions",
    "Sequences",
    "World",
    "candidates",
    "load",
    "load_dataset",
    "make_world",
    "questions",
    "sequences",
    "source_key",
]
