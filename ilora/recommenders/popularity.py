"""Popularity: the recommender that knows no history."""

import numpy as np
import torch
from torch import Tensor

from ilora.data.dataset import Dataset
from ilora.recommenders.base import Recommender


class Popularity(Recommender):
    """An item's score is how often the training users chose it; the history does not matter."""

    def __init__(self, n_items: int) -> None:
        super().__init__(n_items=n_items)
        self.register_buffer("counts", torch.zeros(n_items))

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> "Popularity":
        """Count the events of the users in the train split."""
        train = (dataset.users["split"] == "train").to_numpy()[dataset.events["user"]]
        model = cls(len(dataset.items))
        counts = np.bincount(dataset.events["item"][train], minlength=model.n_items)
        model.counts += torch.from_numpy(counts)
        return model.eval()

    def score_all(self, history: Tensor) -> Tensor:
        return self.counts.expand(len(history), -1)
