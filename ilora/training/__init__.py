"""One `fit` for recommenders and the language model, and its checkpoints."""

from ilora.training.checkpoints import Checkpoints, load_snapshot
from ilora.training.loop import Batches, TrainingArguments, fit

__all__ = ["Batches", "Checkpoints", "TrainingArguments", "fit", "load_snapshot"]
