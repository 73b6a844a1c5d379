"""Popularity: a baseline that ignores the history."""

import numpy as np
import torch
from torch import Tensor

from ilora.data.dataset import Dataset
from ilora.recommenders.base import Recommender


class Popularity(Recommender):
    """Scores an item by the number of its events in the train split."""

    def __init__(self, n_items: int) -> None:
        super().__init__(n_items=n_items)
        self.register_buffer("counts", torch.zeros(n_items))

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> "Popularity":
        """Count the events of the training users."""
        train = (dataset.users["split"] == "train").to_numpy()[dataset.events["user"]]
        model = cls(len(dataset.items))
        model.counts += torch.from_numpy(np.bincount(dataset.events["item"][train], minlength=model.n_items))
        return model.eval()

    def score_all(self, history: Tensor) -> Tensor:
        return self.counts.expand(len(history), -1)
