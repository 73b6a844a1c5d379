"""One training loop for recommenders and language models, with checkpoints."""

from ilora.training.checkpoints import load_snapshot
from ilora.training.loop import TrainingArguments, fit
