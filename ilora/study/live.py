"""Widgets for a live notebook: build a history from titles, see the prompt, the gate and the ranked candidates."""

from collections.abc import Sequence
from html import escape

import ipywidgets as widgets
import numpy as np
import pandas as pd

from ilora.data.dataset import CANDIDATES
from ilora.evaluation.metrics import check_scores
from ilora.language.recommender import LanguageRecommender


class Player(widgets.VBox):
    """Choose a history (item ids, oldest first) and candidates; prompt, gate and ranking follow every change."""

    def __init__(self, recommender: LanguageRecommender, history: Sequence[int]) -> None:
        self.recommender, self.titles = recommender, recommender.prompts.titles
        wide = widgets.Layout(width="100%")
        titles = [self.titles[item] for item in history]
        self.history = widgets.TagsInput(value=titles, allowed_tags=self.titles, allow_duplicates=False, layout=wide)
        self.draw = widgets.IntSlider(description="candidates, draw", min=0, max=99, style={"description_width": "8em"})
        self.prompt, self.gate, self.ranking = widgets.HTML(), widgets.HTML(), widgets.HTML()
        for control in (self.history, self.draw):
            control.observe(self.show, "value")
        label = widgets.Label("History, oldest first: type a title, Enter adds it, Backspace removes the last")
        tables = widgets.HBox([self.ranking, self.gate])
        super().__init__([label, self.history, self.draw, tables, self.prompt], layout=wide)
        self.show()

    def row(self) -> tuple[np.ndarray, np.ndarray, int]:
        """The history's last items and twenty other items; the first of these takes the place of the target."""
        items = [self.titles.index(title) for title in self.history.value]
        others = np.setdiff1d(np.arange(len(self.titles)), items)
        candidates = np.random.default_rng(self.draw.value).choice(others, CANDIDATES, replace=False)
        return np.array(items[-self.recommender.encoder.window :]), candidates, int(candidates[0])

    def show(self, _: object = None) -> None:
        """Rank the candidates and write the results into the widgets."""
        if not self.history.value:
            self.prompt.value, self.gate.value, self.ranking.value = "Add a title to the history.", "", ""
            return
        row = self.row()
        tokens = self.recommender.prompts.write(row[0], row[1], hybrid=True)
        text = escape(self.recommender.prompts.tokenizer.decode(tokens))
        self.prompt.value = f'<pre style="white-space: pre-wrap">{text}</pre>'
        scores = self.recommender.rank([row]).cpu().double().numpy()
        log_likelihood = check_scores(scores, (1, CANDIDATES), type(self.recommender).__name__)[0]
        share = np.exp(log_likelihood - log_likelihood.max())
        ranked = pd.Series(share / share.sum(), [self.titles[item] for item in row[1]], name="share of the twenty")
        self.ranking.value = ranked.sort_values(ascending=False).to_frame().to_html(float_format="{:.3f}".format)
        if self.recommender.gated:
            weights = self.recommender.gate_weights([row]).numpy()[0]
            names = [f"expert {expert + 1}" for expert in range(len(weights))]
            self.gate.value = pd.DataFrame({"gate": weights}, names).to_html(float_format="{:.3f}".format)
